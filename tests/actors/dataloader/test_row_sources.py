"""Who writes each row of each step, beside a plain account of the same rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config.rollouts import AdaptiveShareConfig, ReplayConfig, RolloutsConfig
from actors.dataloader.row_sources import AdaptiveShares, Change, RowPolicy, RowSources, written_by_student
from actors.dataloader.sampler import StepSampler

SEED, ROWS, BATCH, STEPS = 4, 45, 10, 40


def sources_of(**changes: Any) -> RowSources:
    sampler = StepSampler(ROWS, BATCH, SEED, store_order_first=True)
    return RowSources(RowPolicy(**{"student_share": 0.6, **changes}), SEED, sampler.rows_of, STEPS)


def test_a_step_has_as_many_rows_as_are_dealt_to_it() -> None:
    sampler = StepSampler(ROWS, BATCH, SEED, store_order_first=True)
    assert [sampler.rows_of(step) for step in range(1, 11)] == [len(sampler.positions(step)) for step in range(1, 11)]


# ---- replay


@pytest.mark.parametrize("share", [0.5, "progress"])
@pytest.mark.parametrize("kept", [7, 1000])
def test_rows_that_are_learned_again_are_drawn_from_the_latest(share: Any, kept: int) -> None:
    """Beside a list to which each row is appended as it is written."""
    sources, written = sources_of(replay=ReplayConfig(rows=kept, share=share)), []
    again, of_student = [], []
    for step in range(1, STEPS + 1):
        found, student = sources.of_step(step), written_by_student(SEED, step, sources._rows_of(step), 0.6)
        replayed = np.array([row in found.replayed for row in range(len(student))])
        assert np.array_equal(found.written | replayed, student) and not (found.written & replayed).any()
        assert set(found.replayed.values()) <= set(written[-kept:]), "only of earlier steps, and of the latest"
        again.append(int(replayed.sum()))
        of_student.append(int(student.sum()))
        written += [(step, place) for place in range(int(found.written.sum()))]
    assert again[0] == 0, "there is nothing yet"
    if share == "progress":
        assert sum(again[-10:]) / sum(of_student[-10:]) > 0.75 and sum(again[:10]) / sum(of_student[:10]) < 0.25
    else:
        assert abs(sum(again) / sum(of_student) - 0.5) < 0.15


def test_what_is_learned_again_is_known_without_the_steps_before() -> None:
    replay = ReplayConfig(rows=20, share=0.5)
    one_by_one, at_once = sources_of(replay=replay), sources_of(replay=replay)
    all_of_them = [one_by_one.of_step(step) for step in range(1, STEPS + 1)]
    later = at_once.of_step(33)
    assert np.array_equal(later.written, all_of_them[32].written) and later.replayed == all_of_them[32].replayed
    earlier = at_once.of_step(5)
    assert np.array_equal(earlier.written, all_of_them[4].written) and earlier.replayed == all_of_them[4].replayed
    drawn = [place for one in all_of_them for place in one.replayed.values()]
    assert len(set(drawn)) > len(drawn) / 2, "not always the same"


# ---- a share that adapts


def test_the_share_of_a_step_is_what_was_decided_by_the_weights_that_write_it(tmp_path: Path) -> None:
    adaptive, file = AdaptiveShareConfig(every_steps=4), AdaptiveShares(str(tmp_path / "shares.json"))
    sources = sources_of(adaptive=adaptive, shares=file.place, refresh_steps=2, lag=1)
    assert not sources.are_known(1)
    file.write(0, [Change(0, 0.0, 2.0)])
    assert [step for step in range(1, 12) if sources.are_known(step)] == [1, 2, 3, 4], "with a lag two windows have the first"
    assert not sources.of_step(4).written.any()
    file.write(4, [Change(0, 0.0, 2.0), Change(4, 1.0, 2.2)])
    assert [sources.policy.share(step) for step in range(1, 12)] == [0.0] * 6 + [1.0] * 2 + [None] * 3
    assert sources.of_step(7).written.all()
    assert file.read() == (4, [Change(0, 0.0, 2.0), Change(4, 1.0, 2.2)])
    assert json.loads(Path(file.place).read_text())["decided"] == 4


def test_shares_that_are_decided_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    plain = AdaptiveShares.read
    monkeypatch.setattr(AdaptiveShares, "read", lambda file: (reads.append(1), plain(file))[1])
    file = AdaptiveShares(str(tmp_path / "shares.json"))
    sources = sources_of(adaptive=AdaptiveShareConfig(every_steps=4), shares=file.place)
    file.write(8, [Change(0, 0.0, 2.0), Change(4, 1.0, 2.2)])
    assert [sources.share(step) for step in range(1, 10)] == [0.0] * 4 + [1.0] * 5 and len(reads) == 1
    assert not sources.are_known(10) and not sources.are_known(10) and len(reads) == 3
    file.write(9, [Change(0, 0.0, 2.0), Change(4, 1.0, 2.2)])
    assert sources.are_known(10) and sources.of_step(3).written.sum() == 0 and len(reads) == 4


# ---- what cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptive_share": {"first": 0.4}, "student_share": 0.3},
         r"adaptive_share.first 0.4 lies above student_share 0.3, up to which it grows; student_share=0.5 would do"),
        ({"adaptive_share": {"every_steps": 10}, "refresh_steps": 4},
         r"adaptive_share.every_steps 10 is no multiple of the 4 steps of a window, .*; adaptive_share.every_steps=8 would do"),
        ({"replay": {"share": 0.5}, "keep_steps": 100}, r"keep_steps is 100, but replay learns .*; keep_steps=null would do"),
        ({"adaptive_share": {"every_steps": 10}, "refresh_steps": 2, "inner_epochs": 4}, r"8 steps of a window.*=8 would"),
        ({"wire": "candidates", "teacher_share": 0.2}, r"teacher_share is 0.2, and of .*; teacher_share=0 would do, or"),
        ({"replay": {"share": 1.0}}, r"less than 1"),
        ({"replay": {"share": "often"}}, r"'progress'"),
        ({"replay": {"rows": 0}}, r"greater than or equal to 1"),
        ({"adaptive_share": {"raise_by": 0.0}}, r"greater than 0"),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutsConfig.model_validate(settings)
