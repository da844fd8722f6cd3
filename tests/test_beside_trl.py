"""The rows that TRL's trainer is given are those of the run, token by token; TRL itself is not installed for the tests."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.examples import ExampleFile, write_examples
from actors.records import Example, example_key
from benchmarks.beside_trl import Collator, main

ROWS = (([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 3], [0, 1]), ([4, 4, 4], [0, 1, 0]))


@pytest.fixture
def examples(tmp_path: Path) -> ExampleFile:
    arrays = [(np.array(ids, np.int32), np.array(mask, np.uint8)) for ids, mask in ROWS]
    path = tmp_path / "train.arrow"
    write_examples(path, [Example(ids, mask, example_key(ids, mask), row) for row, (ids, mask) in enumerate(arrays)])
    return ExampleFile(path)


def test_labels_stand_at_the_targets_alone(examples: ExampleFile) -> None:
    batch = Collator(examples, pad_id=1)([{"position": 1}, {"position": 0}])
    assert batch["input_ids"].tolist() == [[9, 3, 1, 1], [5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 3, -100, -100], [-100, -100, 7, 8]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_without_trl_it_says_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["configs/study_losses.yaml"])
    assert "trl is not installed here; pip install trl accelerate would do" in capsys.readouterr().err


def test_without_a_run_it_asks_for_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(SystemExit):
        main([])
    assert "the YAML file of a run is missing; configs/study_losses.yaml would do" in capsys.readouterr().err
