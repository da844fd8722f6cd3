"""What tests of scoring share: a teacher's folder and some examples."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from actors.examples import write_examples
from actors.model_source import ModelSource
from actors.records import Example
from tests.fakes import FAKE_VOCAB, fake_examples
from tests.orchestrator.scoring_world import ROWS


@pytest.fixture
def teacher(tmp_path: Path) -> ModelSource:
    folder = tmp_path / "teacher"
    folder.mkdir()
    save_file({"weight": np.arange(6, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vocab_size": FAKE_VOCAB, "transformers_version": "5.0"}))
    return ModelSource(str(folder))


@pytest.fixture
def examples() -> list[Example]:
    return fake_examples(ROWS)


@pytest.fixture
def examples_path(tmp_path: Path, examples: list[Example]) -> Path:
    write_examples(tmp_path / "train.arrow", examples)
    return tmp_path / "train.arrow"
