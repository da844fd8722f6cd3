"""A share of the rows that grows with the loss on held-out rows, and rows that are learned again, in whole trainings."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.config.rollouts import AdaptiveShareConfig, ReplayConfig
from actors.dataloader.row_sources import AdaptiveShares, Change
from actors.score_store.rollout_log import RolloutLog
from actors.student.hand_over import next_change
from tests.actors.student import test_on_policy as on_policy
from tests.actors.student.test_on_policy import BATCH, STEPS, Run

one_load_at_a_time = on_policy._one_load_at_a_time
ADAPTIVE = AdaptiveShareConfig(first=0.2, every_steps=2, tolerance=0.1, raise_by=0.5)


@pytest.mark.parametrize(
    ("changes", "loss", "wanted"),
    [
        ([], 2.0, [Change(6, 0.2, 2.0)]),
        ([Change(0, 0.2, 2.0)], 2.05, []),
        ([Change(0, 0.2, 2.0)], 2.1, [Change(6, 0.7, 2.1)]),
        ([Change(0, 0.2, 2.0), Change(2, 0.7, 2.2)], 2.25, []),
        ([Change(0, 0.2, 2.0), Change(2, 0.7, 2.2)], 2.4, [Change(6, 0.9, 2.4)]),
        ([Change(0, 0.2, 2.0), Change(2, 0.9, 2.2)], 9.0, []),
    ],
    ids=["first", "little", "risen", "since the last change", "up to the most", "at the most"],
)
def test_the_share_grows_when_the_loss_has_risen(changes: list[Change], loss: float, wanted: list[Change]) -> None:
    assert next_change(ADAPTIVE, 0.9, 6, loss, changes) == wanted


def adaptive_run(folder: Path, tolerance: float) -> Run:
    adaptive = AdaptiveShareConfig(first=0.0, every_steps=2, tolerance=tolerance, raise_by=0.5)
    return Run(folder, student_share=0.8, adaptive=adaptive, top_k=8, learning_rate=0.5)


def test_a_student_whose_loss_rises_writes_more_and_more(tmp_path: Path) -> None:
    """A learning rate that spoils it makes the loss rise; one and all are decided after the steps that are due."""
    run = adaptive_run(tmp_path, tolerance=0.1)
    run.go()
    decided, changes = AdaptiveShares(str(tmp_path / "shares.json")).read()
    assert changes[0].step == 0 and changes[0].share == 0.0 and len(changes) > 1 and decided == STEPS
    assert all(change.step % 2 == 0 for change in changes)
    assert [change.share for change in changes] == [0.0, 0.5, 0.8][: len(changes)]
    assert all(later.loss >= earlier.loss + 0.1 for earlier, later in zip(changes, changes[1:], strict=False))
    assert not any(run.log.is_there(step) for step in range(1, changes[1].step + 1)), "nothing was written before"
    assert all(run.log.is_there(step) for step in range(changes[1].step + 2, STEPS + 1))
    assert {facts.numbers["student_share"] for facts in run.facts} <= {0.5, 0.8}


def test_a_student_whose_loss_does_not_rise_so_far_writes_nothing(tmp_path: Path) -> None:
    run = adaptive_run(tmp_path, tolerance=1e6)
    run.go()
    assert [change.share for change in AdaptiveShares(str(tmp_path / "shares.json")).read()[1]] == [0.0]
    assert not run.facts and not run.samplers.by_step


def test_what_was_decided_is_not_decided_again(tmp_path: Path) -> None:
    run = adaptive_run(tmp_path, tolerance=0.1)
    AdaptiveShares(str(tmp_path / "shares.json")).write(STEPS, [Change(0, 0.0, 1.0), Change(2, 0.3, 5.0)])
    run.go()
    assert AdaptiveShares(str(tmp_path / "shares.json")).read() == (STEPS, [Change(0, 0.0, 1.0), Change(2, 0.3, 5.0)])


def test_a_share_that_nobody_decides_is_waited_for_and_then_named(tmp_path: Path) -> None:
    from actors.dataloader.rollout_rows import RolloutRows
    from actors.dataloader.scored_rows import StoredRows

    run = adaptive_run(tmp_path, tolerance=0.1)
    rows = RolloutRows(StoredRows(run.examples, None, 8, run.plan.sampler), RolloutLog(tmp_path / "log"), run.plan.sources)
    assert not rows.batch(1).are_scored()
    with pytest.raises(TimeoutError, match="the student's share of step 1 was not decided within 0 s; the first worker decides"):
        rows.batch(1).wait(0.05)
    over = threading.Event()
    over.set()
    run.writer().run(over)  # ends, though nothing is decided


def test_a_training_learns_again_from_rows_of_earlier_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, replay=ReplayConfig(rows=8, share=0.5))
    seen: dict[int, list[Any]] = {}
    for step in range(1, STEPS + 1):
        seen[step] = list(run.plan.sources.of_step(step).replayed.values())
    assert any(seen.values())
    run.go()
    written = {step: int(run.plan.mask(step).sum()) for step in range(1, STEPS + 1)}
    assert [len(run.log.examples(step)) for step in written if written[step]] == [count for count in written.values() if count]
    assert all(written[step] + len(seen[step]) == BATCH for step in written), "at a share of one"
    other = Run(tmp_path / "other")
    other.go()
    assert any(not torch.equal(weight, other.weights[name]) for name, weight in run.weights.items())
    assert np.isfinite([float(weight.abs().sum()) for weight in run.weights.values()]).all()
