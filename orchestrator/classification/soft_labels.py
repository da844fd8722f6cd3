"""Soft labels without a teacher: a table that is made of the training rows, and written as the model that teaches."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.config.networks import SoftLabels
from actors.environment import task_environment
from actors.examples import ExampleFile
from actors.models import save_model
from actors.networks.autoencoder import label_table
from actors.networks.classifier import SmallClassifier, SmallClassifierConfig, images_of
from orchestrator.classification.label_file import read_label_table
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.models.classifiers import label_names
from orchestrator.models.models import Models

logger = logging.getLogger("atkd")


def make_soft_labels(config: RunConfig, folder: Path, models: Models, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Make the table that stands in the teacher's place, and write it as a model.

    Args:
        config: of the run.
        folder: of the run.
        models: of the run.
        image_shape: of its images; empty for texts.

    Returns:
        The probabilities [C, C], and the error of the autoencoder.
    """
    settings, task = config.teacher.model, config.task
    assert isinstance(settings, SoftLabels) and isinstance(task, ClassificationTask)
    if settings.table is not None:
        table, error = read_label_table(Path(settings.table).expanduser(), [str(label) for label in task.labels]), None
    else:
        table, error = _of_rows(config, settings, folder / "data" / "train.arrow", len(task.labels), image_shape)
    model = SmallClassifier(SmallClassifierConfig(num_labels=len(task.labels), image_shape=image_shape))
    model.config.id2label = label_names(task)
    model.network.logprobs.data = torch.tensor(table, dtype=torch.float32)
    written = Path(models.made("teacher").name)
    written.parent.mkdir(parents=True, exist_ok=True)
    if not written.exists():
        save_model(model, None, written)
    if error is not None:
        logger.info(f"soft labels: the autoencoder's mean squared error is {error:.4g}")
    return {"probabilities": np.exp(table).tolist(), "autoencoder_error": error}


def _of_rows(
    config: RunConfig, settings: SoftLabels, examples: Path, classes: int, image_shape: tuple[int, ...]
) -> tuple[np.ndarray, float | None]:
    """Make the table of the training rows, in a Ray task with the teacher's CPUs."""
    cpus = config.teacher.engine.cpus
    remote = ray.remote(table_of_rows).options(
        name="soft labels", num_cpus=cpus, runtime_env={"env_vars": task_environment(cpus, False)}
    )
    made: tuple[np.ndarray, float | None] = ray.get(remote.remote(str(examples), settings, classes, image_shape, config.seed))
    return made


def table_of_rows(
    examples: str, settings: SoftLabels, classes: int, image_shape: tuple[int, ...], seed: int
) -> tuple[np.ndarray, float | None]:
    """Return log-probabilities [C, C], one distribution for each label, and the error of the autoencoder if there is one.

    Args:
        examples: file of the training rows.
        settings: how the table is made.
        classes: C.
        image_shape: of the images; empty for texts, of which the shares of their tokens are looked at.
        seed: draws weights, order and pairs.
    """
    rows = ExampleFile(Path(examples))
    labels = torch.tensor([int(rows[row].targets[0]) for row in range(len(rows))])
    features = [rows[row].token_ids[:-1] for row in range(len(rows))]
    if image_shape:
        inputs = images_of(torch.from_numpy(np.stack(features).astype(np.int64)), image_shape)
    else:
        vocab_size = 1 + max(int(ids.max()) for ids in features)
        inputs = torch.zeros(len(features), vocab_size)
        for row, ids in enumerate(features):
            inputs[row] = torch.bincount(torch.from_numpy(ids.astype(np.int64)), minlength=vocab_size) / len(ids)
    table, error = label_table(settings, inputs, labels, classes, seed)
    return table.numpy(), error
