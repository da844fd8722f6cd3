"""Rows that pass through preparation some at a time: the same files as all at once, in memory that does not grow with them."""

import json
import random
import tracemalloc
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.examples import ExampleFile
from orchestrator.cluster.processes import map_in_processes
from orchestrator.config.data import DataConfig
from orchestrator.data import dataset, mixture
from orchestrator.data.dataset import prepare_data
from orchestrator.data.mixture import RowSpool, numbered, read_splits, read_training_rows
from tests.orchestrator.data.test_prepare import trained

FILES = ("train.arrow", "heldout.arrow", "heldout_texts.jsonl", "summary.json")


def config(folder: Path, rows: int, **settings: object) -> DataConfig:
    """Rows of a file of their own, some of which are too long, without an answer, or there twice."""
    path = folder / "rows.jsonl"
    draws = random.Random(7)
    with path.open("w") as file:
        for row in range(rows):
            words = " ".join(str(draws.randrange(100)) for _ in range(draws.randrange(2, 30)))
            file.write(json.dumps({"instruction": words, "response": "" if row % 17 == 3 else str(row % 5), "input": ""}) + "\n")
            if row % 8 == 0:
                file.write(json.dumps({"instruction": "The same.", "response": "Again.", "input": ""}) + "\n")
    source = {"kind": "files", "path": str(path)}
    told = {"source": source, "max_tokens": 60, "without_answer": "drop", "heldout_rows": 20, **settings}
    return DataConfig.model_validate(told)


@pytest.mark.parametrize(("at_once", "in_memory"), [(7, 0), (64, 1 << 20)])
def test_some_at_a_time_and_all_at_once_leave_the_same_bytes(
    at_once: int, in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(tmp_path, 300)
    whole = prepare_data(data, lambda texts: trained(), tmp_path / "whole")
    monkeypatch.setattr(dataset, "ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(mixture, "IN_MEMORY", in_memory)
    some = prepare_data(data, lambda texts: trained(), tmp_path / "some")
    assert some == whole and whole.heldout_rows_in_train > 0 and whole.rows_dropped_long > 0 and whole.rows_without_answer > 0
    for name in FILES:
        assert (tmp_path / "some" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_several_processes_leave_the_same_bytes_and_raise_the_same_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = config(tmp_path, 300)
    together = alone.model_copy(update={"processes": 2})
    monkeypatch.setattr(dataset, "ROWS_AT_ONCE", 64)
    whole = prepare_data(alone, lambda texts: trained(), tmp_path / "alone")
    assert prepare_data(together, lambda texts: trained(), tmp_path / "together") == whole
    for name in FILES:
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    refusing = together.model_copy(update={"without_answer": "refuse"})
    with pytest.raises(ValueError, match=r"row \d+: "):
        prepare_data(refusing, lambda texts: trained(), tmp_path / "refused")


@pytest.mark.ray
def test_tasks_of_a_cluster_leave_the_same_bytes_and_raise_the_same_errors(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = config(tmp_path, 300)
    spread = alone.model_copy(update={"cluster_tasks": 3})
    monkeypatch.setattr(dataset, "ROWS_AT_ONCE", 64)
    whole = prepare_data(alone, lambda texts: trained(), tmp_path / "alone")
    assert prepare_data(spread, lambda texts: trained(), tmp_path / "spread", on_cluster=True) == whole
    for name in FILES:
        assert (tmp_path / "spread" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    refusing = spread.model_copy(update={"without_answer": "refuse"})
    with pytest.raises(ValueError, match=r"^row \d+: "):
        prepare_data(refusing, lambda texts: trained(), tmp_path / "refused", on_cluster=True)


def test_a_write_that_fails_ends_the_work_before_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def noted(*arguments: Any) -> Generator[Any]:
        try:
            yield from map_in_processes(*arguments)
        finally:
            ended.append(True)

    def full(path: Path, batches: Iterator[Any]) -> None:
        next(batches)
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(dataset, "map_in_processes", noted)
    monkeypatch.setattr(dataset, "write_batches", full)
    with pytest.raises(OSError, match="no space left") as raised:
        prepare_data(config(tmp_path, 300), lambda texts: trained(), tmp_path / "data")
    assert raised.value.errno == 28 and ended == [True]


def test_a_tokenizer_of_code_of_its_own_is_refused_on_the_cluster(tmp_path: Path) -> None:
    tokenizer = trained()
    kind = type("Own", (type(tokenizer),), {"__module__": "transformers_modules.own.tokenization_own"})
    tokenizer.__class__ = kind
    data = config(tmp_path, 60).model_copy(update={"cluster_tasks": 3})
    with pytest.raises(ValueError, match=r"data\.cluster_tasks is 3, but .* code .* data\.processes=4 would do"):
        prepare_data(data, lambda texts: tokenizer, tmp_path / "data", on_cluster=True)


def test_the_order_is_that_of_one_shuffled_list(tmp_path: Path) -> None:
    data = config(tmp_path, 50)
    numbers = list(range(len(read_training_rows(data))))
    random.Random(f"{data.seed} split").shuffle(numbers)
    train, heldout = read_splits(data)
    assert [row.number for row in heldout] == numbers[:20] and [row.number for row in train] == numbers[20:]


def test_rows_come_back_as_they_were_whatever_they_hold() -> None:
    first = [{"text": "ä\n", "deep": [{"a": None}], "bytes": b"\0", "number": 1.5}, {}]
    spool = RowSpool()
    rows = spool.add("a", first) + spool.add("b", [{"later": True}])
    assert [dict(row.fields) for row in rows] == [*first, {"later": True}]
    assert [(row.number, row.source, row.first) for row in rows] == [(0, "a", 0), (1, "a", 0), (2, "b", 2)]
    assert rows[-1].place == "row 0 of b" and dict(rows.by_source()) == {"a": 2, "b": 1}
    assert rows == list(rows) and rows[1:] == list(rows)[1:] and rows != list(rows)[1:]
    with pytest.raises(IndexError):
        rows[3]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ROWS_AT_ONCE", 100)
    monkeypatch.setattr(mixture, "IN_MEMORY", 1 << 14)
    monkeypatch.setattr("actors.examples.MOST_ROWS", 100)
    tokenizer, peaks = trained(), []
    for rows in (1000, 4000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        data = config(folder, rows)
        tracemalloc.start()
        prepare_data(data, lambda texts: tokenizer, folder / "data")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(ExampleFile(folder / "data" / "train.arrow")) > rows / 2
    assert peaks[1] < peaks[0] + 100 * 3000, "numbers of rows alone; as text and tokens a row takes over 1,000"


def test_rows_are_read_once_and_as_they_are_taken() -> None:
    taken: list[int] = []

    def rows() -> Iterator[dict[str, int]]:
        for row in range(5):
            taken.append(row)
            yield {"row": row}

    spooled = numbered(rows())
    assert taken == [0, 1, 2, 3, 4]
    assert [row.fields["row"] for row in spooled] == [row.fields["row"] for row in spooled] == taken
