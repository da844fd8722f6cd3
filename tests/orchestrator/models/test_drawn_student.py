"""Students that a search draws for one trial: the same as those that a run of the trial's configuration draws."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.models import load_model
from orchestrator.classification.preparation import prepare_run
from orchestrator.config.load import validate
from orchestrator.data.grading import GRADES
from orchestrator.models.drawn_student import draw_student, models_of_trial
from orchestrator.models.models import Models
from tests.orchestrator.config.test_run import SMALL

TEXTS = [" ".join(f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmn" for c in "opqrst")]


def language_models(folder: Path, student: dict[str, Any]) -> Models:
    """The models of a run whose student has the shape, drawn as the stage ``prepare`` does."""
    tree = {**copy.deepcopy(SMALL), "name": "run", "output": str(folder), "student": {"model": student}}
    models = Models(validate(tree), folder / "run")
    models.make_scratch_models(models.tokenizer_for(TEXTS))
    return models


def classifiers(folder: Path, student: dict[str, Any]) -> Models:
    """The same of a run of classification, of texts or of images of 2 x 2 pixels."""
    tree: dict[str, Any] = {"name": "run", "output": str(folder), "student": {"model": student}}
    if student["kind"].startswith("text"):
        tree |= {"task": {"kind": "classification", "labels": list(GRADES), "field": "grade"}, "tokenizer": {"vocab_size": 300}}
        tree["data"] = {"source": {"kind": "builtin_grading", "rows": 60}, "format": {"kind": "text", "text": "{{ answer }}"}}
    else:
        rows = [{"image": [[row / 40, 1.0], [0.0, row % 2]], "label": row % 2} for row in range(40)]
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        tree["data"] = {"source": {"kind": "files", "path": str(folder / "rows.jsonl")}, "format": {"kind": "image"}}
        tree["task"] = {"kind": "classification", "labels": [0, 1]}
    tree["data"]["heldout_rows"] = 10
    tree["teacher"] = {"model": {"kind": "soft_labels", "similarity": "uniform"}}
    models = Models(validate(tree), folder / "run")
    prepare_run(models.config, folder / "run", models)
    return models


def files_of(models: Models) -> dict[str, bytes]:
    """The student's files; the settings of a tokenizer say whether it was read from a folder, and are left out."""
    folder = Path(models.ready("student").name)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "tokenizer_config.json"}


SCRATCH = {"kind": "scratch", "hidden_size": 32, "layers": 1, "heads": 2}
SHAPES = [
    (language_models, SCRATCH, {**SCRATCH, "hidden_size": 48, "heads": 4, "kv_heads": 2}),
    (language_models, SCRATCH, {**SCRATCH, "layers": 3, "tie_embeddings": False}),
    (classifiers, {"kind": "text_mlp"}, {"kind": "text_mlp", "width": 3}),
    (classifiers, {"kind": "text_mlp"}, {"kind": "text_cnn", "kernels": [1, 200]}),
    (classifiers, {"kind": "text_cnn"}, {"kind": "text_rnn", "hidden": 5}),
    (classifiers, {"kind": "image_cnn"}, {"kind": "image_resnet", "stages": 4}),
    (classifiers, {"kind": "image_resnet"}, {"kind": "image_cnn", "channels": 4, "layers": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("make", "own", "other"), SHAPES, ids=lambda shape: shape["kind"] if isinstance(shape, dict) else "")
def test_a_trial_draws_what_a_run_of_its_configuration_draws(make: Any, own: Any, other: Any, tmp_path: Path) -> None:
    """Byte for byte, whatever numbers were drawn before; the run's own student stays as it is."""
    run, best = make(tmp_path / "own", own), make(tmp_path / "best", other)
    before = files_of(run)
    torch.manual_seed(7)
    trial = models_of_trial(best.config, run.config, tmp_path / "own" / "run", tmp_path / "trial" / "student")
    size = draw_student(trial, run)
    assert trial.ready("student").name == str(tmp_path / "trial" / "student")
    assert files_of(trial) == files_of(best) and files_of(run) == before
    assert size == sum(weight.numel() for weight in load_file(tmp_path / "trial" / "student" / "model.safetensors").values())
    assert size != draw_student(run, run), "the run's own has another size"
    assert trial.ready("teacher") == run.ready("teacher") and trial.tokenizer_folder == run.tokenizer_folder


def test_a_trial_of_the_runs_own_shape_draws_nothing(tmp_path: Path) -> None:
    run = language_models(tmp_path, SCRATCH)
    trial = models_of_trial(run.config, run.config, tmp_path / "run", tmp_path / "trial")
    before = files_of(run)
    assert draw_student(trial, run) == 400 * 32 + 32 * (4 * 32 + 3 * 96) + 3 * 32, "embeddings, one block, norms"
    assert trial.ready("student") == run.ready("student") and files_of(trial) == before and not (tmp_path / "trial").exists()


def test_of_a_student_that_is_not_drawn_nothing_is_known(tmp_path: Path) -> None:
    tree = {**copy.deepcopy(SMALL), "tokenizer": None, "student": {"model": {"kind": "pretrained", "name": "a/model"}}}
    run = Models(validate(tree), tmp_path)
    assert draw_student(run, run) is None


@pytest.mark.parametrize("other", [{"kind": "text_cnn", "kernels": [1, 200]}, {"kind": "image_cnn", "layers": 5}])
def test_no_shape_is_too_large_for_the_rows(other: dict[str, Any], tmp_path: Path) -> None:
    """Filters longer than any text, more halvings than an image has pixels: nothing of this is refused, since it works."""
    model = load_model(classifiers(tmp_path / "run", other).ready("student")).eval()
    if other["kind"] == "text_cnn":
        assert model(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()
    else:
        assert model(pixel_values=torch.zeros(1, 1, 2, 2)).logits.isfinite().all()
