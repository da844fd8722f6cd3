"""The ledger: what is written is read back, a cut line is no harm, a damaged one is named, another search's is refused."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.search.ledger import Ledger, Search, read_ledger, require_same
from orchestrator.search.ledger_records import SearchSpec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
METRICS = st.dictionaries(st.sampled_from(["heldout_loss", "top1_agreement"]), st.none() | st.floats(allow_nan=False), max_size=2)
POINT = st.dictionaries(st.text(max_size=9), JSON, max_size=2)
BEGUN = st.fixed_dictionaries({"point": POINT, "seed": st.integers(0, 9), "arm": st.none() | st.text(max_size=5)})
RUNG = st.fixed_dictionaries(
    {
        "rung": st.integers(0, 5), "step": st.integers(0, 500), "metrics": METRICS,
        "decision": st.sampled_from(["continue", "stop"]), "seconds": st.floats(0, 1e6),
    }
)  # fmt: skip
ENDED = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["completed", "stopped", "failed"]), "step": st.integers(0, 500), "metrics": METRICS,
        "seconds": st.floats(0, 1e6), "student_tokens": st.integers(0, 10**12), "error": st.none() | st.text(),
        "parameters": st.none() | st.integers(0, 10**12),
    }
)  # fmt: skip
EVENT = st.one_of(st.tuples(st.just(name), fields) for name, fields in (("begun", BEGUN), ("rung", RUNG), ("ended", ENDED)))
EVENTS = st.lists(EVENT | st.just(("search", {})), max_size=12)
RUBBISH = [
    (b"\xff\xfe{}", "byte 0xff is no UTF-8; the file is damaged"),
    (b'{"event": "beg', "malformed JSON at column 11: Unterminated string starting at; the file is damaged"),
    (b"\0\0\0", "malformed JSON at column 1"),
    (b"[1, 2]", "got [1, 2]"),
    (b'{"event": "paused"}', "Input tag 'paused' found using 'event' does not match any of the expected tags"),
    (b'{"event": "begun", "trial": -1, "point": {}, "seed": 0}', "begun.trial: Input should be greater than or equal to 0"),
    (b'{"event": "begun", "trial": 7, "seed": 0}', "begun.point: Field required"),
    (b'{"event": "rung", "trial": 7, "rung": 0, "step": 1, "metrics": {}, "decision": "stop", "seconds": 1}',
     "trial 7 has a line of the event rung and has not begun"),
    (b"", "malformed JSON at column 1"),
]  # fmt: skip


def spec_of(**changes: Any) -> SearchSpec:
    spec = {
        "kind": "tune", "name": "tiny", "metric": "heldout_loss", "mode": "min", "total_steps": 500, "rungs": (250, 500),
        "space": {"loss.easy_ratio": {"low": 0.1, "high": 0.9}}, "trials": 12,
    }  # fmt: skip
    return SearchSpec(**{**spec, **changes})


def written_ledger(folder: Path) -> Ledger:
    """Two trials: 0 completed, 1 had one rung."""
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.begin_search(spec_of())
    for trial in (0, 1):
        ledger.begun(trial, {"loss.easy_ratio": 0.3}, seed=0)
        ledger.rung(trial, 0, 250, {"heldout_loss": 2.5}, "continue", 1.0)
    ledger.rung(0, 1, 500, {"heldout_loss": 2.25}, "continue", 2.0)
    ledger.ended(0, "completed", 500, {"heldout_loss": 2.25}, 2.5, 1000)
    return ledger


@given(EVENTS)
def test_whatever_is_written_is_read_back(events: list[tuple[str, dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "deep" / "ledger.jsonl")
        ledger.begin_search(spec_of())
        expected: dict[int, list[tuple[str, dict[str, Any]]]] = {}
        for event, fields in events:
            number = len(expected) - 1
            if event == "begun":
                expected[number + 1] = [(event, fields)]
                ledger.begun(number + 1, **fields)
            elif event == "search":
                ledger.begin_search(spec_of(trials=20))
            elif expected and expected[number][-1][0] != "ended":
                expected[number].append((event, fields))
                getattr(ledger, event)(number, **fields)
        search = read_ledger(ledger.path)
    assert len(search.starts) == 1 + sum(event == "search" for event, _ in events)
    assert [trial.number for trial in search.trials] == list(expected)
    for trial in search.trials:
        lines = [trial.begun, *trial.rungs, *([trial.ended] if trial.ended else [])]
        read = [(line.event, line.model_dump(exclude={"event", "trial", "time"})) for line in lines]
        assert read == expected[trial.number]


def test_a_ledger_cut_at_any_byte_of_its_last_line_reads_as_without_it_and_goes_on(tmp_path: Path) -> None:
    ledger = written_ledger(tmp_path)
    before = read_ledger(ledger.path)
    content = ledger.path.read_bytes()
    ledger.ended(1, "failed", 250, {}, 1.0, 500, "RuntimeError: ü")
    last = ledger.path.read_bytes()[len(content) :]
    for cut in range(len(last)):
        ledger.path.write_bytes(content + last[:cut])
        assert read_ledger(ledger.path) == before
        if cut % 10 == 0:
            again = ledger.begin_search(spec_of())
            assert again.trials == before.trials and len(again.starts) == 2


def test_a_search_killed_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"event": "sea')
    assert Ledger(tmp_path / "ledger.jsonl").begin_search(spec_of()).trials == ()


@pytest.mark.parametrize(("rubbish", "words"), RUBBISH)
def test_a_damaged_line_is_named(tmp_path: Path, rubbish: bytes, words: str) -> None:
    ledger = written_ledger(tmp_path)
    lines = ledger.path.read_bytes().split(b"\n")
    ledger.path.write_bytes(b"\n".join([*lines[:3], rubbish, *lines[3:]]))
    with pytest.raises(ValueError) as caught:
        read_ledger(ledger.path)
    assert str(caught.value).startswith(f"{ledger.path}:4: ") and words in str(caught.value)


def test_lines_in_an_impossible_order_are_named(tmp_path: Path) -> None:
    ledger = written_ledger(tmp_path)
    ledger.rung(0, 2, 600, {}, "stop", 3.0)
    with pytest.raises(ValueError, match="jsonl:8: trial 0 has ended, and a line of the event rung follows"):
        read_ledger(ledger.path)
    ledger.path.write_bytes(b"\n".join(ledger.path.read_bytes().split(b"\n")[1:]))
    with pytest.raises(ValueError, match="jsonl:1: begun stands before any line of the event search"):
        read_ledger(ledger.path)


def test_no_ledger_and_an_empty_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no ledger at .*ledger\.jsonl; a search or a comparison writes it"):
        read_ledger(tmp_path / "ledger.jsonl")
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(ValueError, match=r"ledger\.jsonl holds no search; delete it"):
        read_ledger(tmp_path / "ledger.jsonl")


def test_another_searchs_ledger_is_refused_with_what_differs(tmp_path: Path) -> None:
    ledger = written_ledger(tmp_path)
    other = spec_of(
        kind="compare", name="big", metric="top1_agreement", mode="max", space={"seed": [0, 1]}, total_steps=7, rungs=(7,)
    )
    content = ledger.path.read_bytes()
    with pytest.raises(ValueError) as caught:
        ledger.begin_search(other)
    for line in (
        f"{ledger.path}: this is the ledger of another search:", "kind: 'compare' here, 'tune' there",
        "name: 'big' here, 'tiny' there", "metric: 'top1_agreement' here, 'heldout_loss' there", "mode: 'max' here, 'min' there",
        "total_steps: 7 here, 500 there", "rungs: (7,) here, (250, 500) there", "space.seed: [0, 1] here, None there",
        "space.loss.easy_ratio: None here, {'low': 0.1, 'high': 0.9} there", ".name=... gives this one a folder of its own",
    ):  # fmt: skip
        assert line in str(caught.value)
    assert ledger.path.read_bytes() == content, "nothing was written"
    require_same(spec_of(), spec_of(trials=99, baseline="forward_kl"))


def test_two_searches_in_one_file_are_named(tmp_path: Path) -> None:
    ledger = written_ledger(tmp_path)
    other = Ledger(tmp_path / "other.jsonl")
    other.begin_search(spec_of(name="big"))
    ledger.path.write_bytes(ledger.path.read_bytes() + other.path.read_bytes())
    with pytest.raises(ValueError, match=r"jsonl:8: this is the ledger of another search:\n  name: 'tiny' here, 'big' there"):
        read_ledger(ledger.path)


def test_a_space_with_tuples_is_the_same_after_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    spec = spec_of(space={"loss.scope": ("batch", "dataset")})
    ledger.begin_search(spec)
    assert ledger.begin_search(spec).spec.space == {"loss.scope": ["batch", "dataset"]}


def test_a_trial_that_begins_again_forgets_what_it_did(tmp_path: Path) -> None:
    ledger = written_ledger(tmp_path)
    ledger.begun(0, {"loss.easy_ratio": 0.4}, seed=1)
    trial = read_ledger(ledger.path).trials[0]
    assert (trial.rungs, trial.ended, trial.begun.point, trial.step, trial.metrics) == ((), None, {"loss.easy_ratio": 0.4}, 0, {})


def test_fields_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    ledger = written_ledger(tmp_path)
    lines = [json.loads(line) | {"novelty": 1} for line in ledger.path.read_text().splitlines()]
    before = read_ledger(ledger.path)
    ledger.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_ledger(ledger.path) == before


def statuses(search: Search) -> list[str]:
    return [search.status(trial) for trial in search.trials]


def test_measures_that_are_no_finite_numbers_make_a_trial_fail(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.begin_search(spec_of())
    endings: list[dict[str, float | None]] = [
        {"heldout_loss": 2.0, "rouge_l": None}, {"heldout_loss": math.nan}, {"heldout_loss": 2.0, "kl": math.inf}, {"kl": 1.0},
    ]  # fmt: skip
    for number, metrics in enumerate(endings):
        ledger.begun(number, {}, seed=0)
        ledger.ended(number, "completed", 500, metrics, 1.0, 10)
    ledger.begun(4, {}, seed=0)
    ledger.rung(4, 0, 250, {"heldout_loss": -math.inf}, "continue", 1.0)
    search = read_ledger(ledger.path)
    assert statuses(search) == ["completed", "failed", "failed", "failed", "unfinished"]
    assert [search.error(trial) for trial in search.trials] == [
        None, "heldout_loss is nan after 500 steps", "kl is inf after 500 steps", "heldout_loss was not measured", None,
    ]  # fmt: skip
    assert [search.value(trial) for trial in search.trials] == [2.0, None, 2.0, None, None]
    assert search.with_status("failed", "unfinished") == list(search.trials[1:])


def test_an_error_with_half_a_character_can_be_written(tmp_path: Path) -> None:
    ledger = written_ledger(tmp_path)
    ledger.ended(1, "failed", 250, {}, 1.0, 500, "no file \udc80.txt")
    search = read_ledger(ledger.path)
    assert search.error(search.trials[1]) == "no file \\udc80.txt"
    ledger.begun(1, {}, seed=0)
    ledger.ended(1, "failed", 0, {}, 1.0, 0)
    search = read_ledger(ledger.path)
    assert search.error(search.trials[1]) == "no error was recorded"
