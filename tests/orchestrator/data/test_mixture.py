"""Which rows a run has: drawn, held out, and mixed from several sources by weight."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.config.data import DataConfig
from orchestrator.data.mixture import NumberedRow, choose_rows, numbered, read_splits, read_training_rows, rows_by_weight


def write_rows(folder: Path, name: str, count: int) -> dict[str, Any]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{name} {row}?", "response": f"{row}"}) + "\n" for row in range(count)))
    return {"kind": "files", "path": str(path)}


def mixed(*shares: dict[str, Any], **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"sources": list(shares), "heldout_rows": 2, **settings})


def questions(count: int) -> list[NumberedRow]:
    return numbered([{"prompt": f"{number}?", "response": f"{number}!"} for number in range(count)])


def test_the_split_is_disjoint_complete_shuffled_and_keeps_indices() -> None:
    rows = questions(50)
    train, heldout = choose_rows(rows, DataConfig(heldout_rows=10, seed=1))
    indices = [row.number for row in train + heldout]
    assert sorted(indices) == list(range(50)) and len(heldout) == 10
    assert indices[:40] != sorted(indices[:40])
    assert all(rows[row.number] == row for row in train + heldout)


def test_the_split_depends_on_the_seed_alone() -> None:
    rows = questions(50)
    assert choose_rows(rows, DataConfig(heldout_rows=10, seed=1)) == choose_rows(rows, DataConfig(heldout_rows=10, seed=1))
    assert choose_rows(rows, DataConfig(heldout_rows=10, seed=1)) != choose_rows(rows, DataConfig(heldout_rows=10, seed=2))


def test_fewer_rows_keep_the_same_held_out_rows() -> None:
    rows = questions(50)
    train, heldout = choose_rows(rows, DataConfig(heldout_rows=10))
    fewer_train, fewer_heldout = choose_rows(rows, DataConfig(heldout_rows=10, max_rows=20))
    assert fewer_heldout == heldout
    assert fewer_train == train[:10]
    assert choose_rows(rows, DataConfig(heldout_rows=10, max_rows=99)) == (train, heldout)


@pytest.mark.parametrize("heldout_rows", [50, 200])
def test_too_many_held_out_rows_name_the_key_and_a_number_that_would_do(heldout_rows: int) -> None:
    with pytest.raises(
        ValueError, match=rf"data\.heldout_rows {heldout_rows} leaves none of 50 rows .*; data\.heldout_rows=5 would do"
    ):
        choose_rows(questions(50), DataConfig(heldout_rows=heldout_rows))
    choose_rows(questions(50), DataConfig(heldout_rows=5))


def test_one_row_is_too_few() -> None:
    with pytest.raises(ValueError, match=r"leaves none of 1 rows to train on; at least two rows are needed"):
        choose_rows(questions(1), DataConfig(heldout_rows=1))


def test_without_weights_all_rows_of_all_sources_are_there_and_know_where_they_stand(tmp_path: Path) -> None:
    data = mixed({"source": write_rows(tmp_path, "a", 3)}, {"source": write_rows(tmp_path, "b", 2)})
    rows = read_training_rows(data)
    assert [row.fields["prompt"] for row in rows] == ["a 0?", "a 1?", "a 2?", "b 0?", "b 1?"]
    assert [row.number for row in rows] == [0, 1, 2, 3, 4]
    assert [row.place for row in rows[2:4]] == ["row 2 of data.sources.0", "row 0 of data.sources.1"]


def test_weights_are_the_shares_and_no_row_is_there_twice(tmp_path: Path) -> None:
    shares = [{"source": write_rows(tmp_path, "a", 90), "weight": 3}, {"source": write_rows(tmp_path, "b", 40), "weight": 1}]
    rows = read_training_rows(mixed(*shares))
    assert Counter(row.source for row in rows) == {"data.sources.0": 90, "data.sources.1": 30}
    assert len({row.number for row in rows}) == 120
    assert [row.number for row in rows] == sorted(row.number for row in rows)
    drawn = [row.number - row.first for row in rows if row.source == "data.sources.1"]
    assert drawn != list(range(30)), "drawn from all of its rows, not the first"
    assert read_training_rows(mixed(*shares)) == rows != read_training_rows(mixed(*shares, seed=1))
    train, heldout = read_splits(mixed(*shares))
    assert sorted([*train, *heldout]) == sorted(rows) and len(heldout) == 2


def test_limits_hold_before_weights_and_before_rows_are_held_out(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path, "a", 90), write_rows(tmp_path, "b", 40)
    rows = read_training_rows(mixed({"source": a, "weight": 1, "max_rows": 10}, {"source": b, "weight": 2}))
    assert Counter(row.source for row in rows) == {"data.sources.0": 10, "data.sources.1": 20}
    few = read_training_rows(mixed({"source": a, "weight": 1}, {"source": b, "weight": 2}, max_rows=30))
    assert Counter(row.source for row in few) == {"data.sources.0": 10, "data.sources.1": 20}
    limited = read_training_rows(mixed({"source": a, "max_rows": 5}, {"source": b}))
    assert Counter(row.source for row in limited) == {"data.sources.0": 5, "data.sources.1": 40}


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100.0)), min_size=1, max_size=6), st.none() | st.integers(10, 400))
def test_shares_are_met_to_a_row_and_are_the_largest_that_can_be(sources: list[tuple[int, float]], most: int | None) -> None:
    available = {str(index): rows for index, (rows, _) in enumerate(sources)}
    weights = {str(index): weight for index, (_, weight) in enumerate(sources)}
    counts, total = rows_by_weight(available, weights, most), sum(weights.values())
    taken = sum(counts.values())
    for key, count in counts.items():
        assert count <= available[key]
        assert abs(count - (taken * weights[key] / total)) <= len(sources)
    exhausted = any(count >= available[key] - 1 for key, count in counts.items())
    assert exhausted or (most is not None and most - len(sources) <= taken <= most)


def test_a_weight_that_leaves_no_row_names_one_that_would_do(tmp_path: Path) -> None:
    data = mixed(
        {"source": write_rows(tmp_path, "a", 20), "weight": 100}, {"source": write_rows(tmp_path, "b", 20), "weight": 1}
    )
    said = (
        r"data\.sources\.1\.weight 1 leaves no row of its 20, since the shares allow 20 rows in all; "
        r"data\.sources\.1\.weight=100 would do"
    )
    with pytest.raises(ValueError, match=said):
        read_training_rows(data)


def test_a_missing_file_is_named_by_the_key_of_its_source(tmp_path: Path) -> None:
    missing = {"kind": "files", "path": str(tmp_path / "none.jsonl")}
    with pytest.raises(ValueError, match=r"there is no file .*none\.jsonl; data\.sources\.1\.source\.path=\.\.\. names"):
        read_training_rows(mixed({"source": write_rows(tmp_path, "a", 20)}, {"source": missing}))
    with pytest.raises(ValueError, match=r"data\.heldout\.source\.path=\.\.\. names"):
        read_splits(DataConfig.model_validate({"heldout": {"source": missing}}))


BUILTIN = {"source": {"kind": "builtin"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": {"kind": "builtin"}, "sources": [BUILTIN]}, "source and sources both say where rows come from; leave one"),
        ({"sources": [{**BUILTIN, "weight": 2}, BUILTIN]}, r"sources\.1\.weight is null while others have one; give each"),
        ({"sources": []}, "at least 1 item"),
        ({"sources": [{**BUILTIN, "weight": 0}]}, "greater than 0"),
        (
            {"sources": [{**BUILTIN, "format": {"kind": "chat"}}, {**BUILTIN, "format": {"kind": "alpaca", "template": "x"}}]},
            r"data\.sources\.1 and data\.sources\.0 have different formats: template is 'x' in one and None in the other, and a "
            "student has one chat template; the same in both would do",
        ),
    ],
)
def test_sources_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(settings)


def test_one_source_is_dealt_as_one_list_of_rows_is(tmp_path: Path) -> None:
    rows = list(range(30))
    random.Random("3 split").shuffle(rows)
    data = DataConfig.model_validate({"source": write_rows(tmp_path, "a", 30), "heldout_rows": 4, "seed": 3})
    train, heldout = read_splits(data)
    assert [row.number for row in heldout + train] == rows
