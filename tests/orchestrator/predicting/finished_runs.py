"""Folders of runs as they are at their end, prepared really, their student as it began."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.classification.preparation import prepare_run
from orchestrator.config.load import validate
from orchestrator.config.run import RunConfig
from orchestrator.data.grading import GRADES
from orchestrator.models.models import Models
from orchestrator.run.run_dir import RunDir
from orchestrator.run.stages import prepare

GRADING: dict[str, Any] = {
    "name": "grading", "tokenizer": {"vocab_size": 400},
    "task": {"kind": "classification", "labels": list(GRADES), "field": "grade"},
    "data": {
        "source": {"kind": "builtin_grading", "rows": 120}, "heldout_rows": 20, "max_tokens": 96,
        "format": {"kind": "text", "text": "{{ question }} {{ answer }}"},
    },
    "teacher": {"model": {"kind": "text_mlp"}, "finetune": {"train": {}}}, "student": {"model": {"kind": "text_cnn"}},
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "name": "language", "tokenizer": {"vocab_size": 400},
    "data": {"source": {"kind": "builtin", "rows": 80}, "heldout_rows": 10, "max_tokens": 80},
    "teacher": {"model": {"kind": "scratch", "hidden_size": 64, "layers": 1, "heads": 2}, "finetune": {"train": {}}},
    "student": {"model": {"kind": "scratch", "hidden_size": 32, "layers": 1, "heads": 2}},
    "evaluate": {"max_new_tokens": 12, "generate_rows": 4},
}  # fmt: skip


def finished(output: Path, tree: dict[str, Any], **sections: Any) -> RunConfig:
    """Prepare a run and give it a student; return its configuration."""
    config = validate({**tree, "output": str(output), **sections})
    with RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        work = partial(prepare_run, config, run_dir.path, models) if config.classes else partial(prepare, config, run_dir, models)
        run_dir.stage("prepare", work)
        shutil.copytree(models.begun("student").name, models.student_folder)
        run_dir.finish("export", {"seconds": 0.0})
    return config


def image_rows(folder: Path, count: int = 40) -> Path:
    """Images of 4 x 4 with a label."""
    path = folder / "images.jsonl"
    lines = [
        {"image": [[(row * 7 + y * 5 + x * 3) % 16 for x in range(4)] for y in range(4)], "label": row % 2}
        for row in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def images(folder: Path) -> RunConfig:
    """A run of images of 4 x 4."""
    source = {"kind": "files", "path": str(image_rows(folder))}
    return finished(
        folder, GRADING, name="images", tokenizer=None, task={"kind": "classification", "labels": [0, 1]},
        data={"source": source, "heldout_rows": 10, "format": {"kind": "image", "divide_by": 16}},
        teacher={"model": {"kind": "soft_labels"}}, student={"model": {"kind": "image_cnn", "channels": 4}},
    )  # fmt: skip


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows, one a line; return the file's name."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)
