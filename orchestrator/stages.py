"""The work of each stage that trains or prepares; what it makes goes into the run's folder, what it found into its books."""

from dataclasses import asdict
from pathlib import Path

from actors.score_store import ScoreStore
from actors.training_task import TrainingTask
from losses.config import HardLabelLoss
from orchestrator.config import RunConfig
from orchestrator.dataset import prepare_data
from orchestrator.models import ROLES, Models, Role
from orchestrator.rows import source_hash
from orchestrator.run_dir import Facts, RunDir, result_path
from orchestrator.training import train_model


def prepare(config: RunConfig, books: RunDir, models: Models) -> Facts:
    """Turn rows into token ids and masks, and draw the weights of models that are made from scratch."""
    for role in ROLES:
        models.begun(role).require_safetensors()
    counts = prepare_data(config.data, models.tokenizer_for, books.path / "data")
    models.make_scratch_models(models.tokenizer())
    books.say(f"prepare: {counts.line()}")
    return {"counts": asdict(counts), "source_sha256": source_hash(config.data.source)}


def require_same_source(config: RunConfig, prepared: Facts) -> None:
    """Refuse to go on with the rows of files that were changed since they were read.

    Raises:
        ValueError: naming the files and what to do.
    """
    now = source_hash(config.data.source)
    if now is not None and now != prepared["source_sha256"]:
        assert config.data.source.kind == "files"
        raise ValueError(
            f"data.source.path {config.data.source.path} was changed since this run read it; give the run another name "
            "(name=...), or delete its folder to begin again"
        )


def fit(role: Role, config: RunConfig, books: RunDir, models: Models) -> Facts:
    """Train a role's model on the data itself, as the paper's teachers are."""
    fitting = models.side(role).fit
    assert fitting is not None
    task = TrainingTask(
        name=f"fit_{role}",
        model=models.begun(role),
        tokenizer=str(models.tokenizer_folder),
        lora=None,
        loss=HardLabelLoss(teaching="hard_label"),
        train=fitting.train,
        examples=str(books.path / "data" / "train.arrow"),
        store=None,
        top_k=config.scores.top_k,
        wait_seconds=config.scores.wait_seconds,
        seed=config.seed,
        threads=int(max(1, fitting.workers.cpus)),
        metrics=str(books.path / "metrics"),
        output=str(models.fitted_folder(role)),
        run=config.name,
        tracking=config.tracking,
    )
    return train_model(task, fitting.workers, books.path / "checkpoints", books.say)


def train(config: RunConfig, books: RunDir, models: Models, store: ScoreStore | None) -> Facts:
    """Distil the student from the store, which may still be growing."""
    task = distillation_task(config, books.path, models, store.path if store is not None else None)
    return train_model(task, config.workers, books.path / "checkpoints", books.say)


def distillation_task(config: RunConfig, folder: Path, models: Models, store: Path | None) -> TrainingTask:
    """Return the training of the student of a run whose folder is ``folder``."""
    return TrainingTask(
        name="train",
        model=models.ready("student"),
        tokenizer=str(models.tokenizer_folder),
        lora=config.student.lora,
        loss=config.loss,
        train=config.train,
        examples=str(folder / "data" / "train.arrow"),
        store=str(store) if store is not None else None,
        top_k=config.scores.top_k,
        wait_seconds=config.scores.wait_seconds,
        seed=config.seed,
        threads=int(max(1, config.workers.cpus)),
        metrics=str(folder / "metrics"),
        output=str(models.student_folder),
        run=config.name,
        tracking=config.tracking,
        teacher_done=str(result_path(folder, "score")),
    )
