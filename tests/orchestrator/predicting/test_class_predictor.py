"""What a classifier answers to rows without labels, against a plain forward pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.config.models import EvaluateConfig
from actors.evaluation.predictions import ClassPredictor
from orchestrator.config.run import RunConfig
from orchestrator.data.mixture import numbered
from orchestrator.models.models import Models
from orchestrator.predicting.questions import class_questions, source_of
from tests.orchestrator.predicting.finished_runs import images


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return images(tmp_path_factory.mktemp("images"))


def test_images_are_seen_as_in_training(seeing: RunConfig) -> None:
    source = source_of(Models(seeing, seeing.run_dir), "student")
    image = np.arange(16, dtype=np.float32).reshape(4, 4)
    rows = numbered([{"image": image.tolist()}, {"image": (15 - image).tolist()}])
    asked = class_questions(rows, seeing, seeing.data.format, Models(seeing, seeing.run_dir), "student", seeing.run_dir)
    found = ClassPredictor(source, EvaluateConfig()).predict([question.token_ids for question in asked])
    model = AutoModelForSequenceClassification.from_pretrained(source.name).eval()
    with torch.inference_mode():
        logits = model(pixel_values=torch.from_numpy(np.stack([image, 15 - image])[:, None] / 16)).logits
    assert np.allclose(found, logits.double().softmax(dim=1).numpy(), atol=1e-6)


def test_a_model_that_says_nothing_finite_is_named(seeing: RunConfig, tmp_path: Path) -> None:
    source = source_of(Models(seeing, seeing.run_dir), "student")
    model = AutoModelForSequenceClassification.from_pretrained(source.name)
    with torch.no_grad():
        model.network.output.bias.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    broken = ClassPredictor(source.__class__(str(tmp_path), classes=2), EvaluateConfig())
    with pytest.raises(ValueError, match=r"gives logits that are not finite; its training diverged$"):
        broken.predict([np.zeros(16, np.int32)])
