"""The work of each stage that trains or prepares; what it makes goes into the run's folder, what it found into its run_dir."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from actors.score_store.store import ScoreStore
from actors.student.task import TrainingTask
from losses.config import HardLabelLoss
from orchestrator.config.data import SourceConfig
from orchestrator.config.run import RunConfig
from orchestrator.data.dataset import prepare_data
from orchestrator.data.sources import source_hash
from orchestrator.run.model_checks import require_models_fit, row_limits
from orchestrator.run.models import ROLES, Models, Role
from orchestrator.run.run_dir import Facts, RunDir, result_path
from orchestrator.run.training import train_model

logger = logging.getLogger("atkd")


def prepare(config: RunConfig, run_dir: RunDir, models: Models) -> Facts:
    """Turn rows into token ids and masks, settle where answers end, and draw the weights of models made from scratch."""
    for role in ROLES:
        models.named(role).require_safetensors()
    data = run_dir.path / "data"
    counts = prepare_data(config.data, models.tokenizer_for, data)
    tokenizer = models.tokenizer()
    ends = models.settle_answer_ends(tokenizer, sorted(counts.turn_ends, key=lambda end: -counts.turn_ends[end]))
    models.make_scratch_models(tokenizer)
    remarks = [*counts.lines(config.data), *describe_ends(ends.ids, ends.ignored, tokenizer)]
    remarks += require_models_fit(config, models, row_limits(config, data))
    remarks += [merged for role in ROLES if (merged := models.merge_adapter(role))]
    for remark in remarks:
        logger.info(f"prepare: {remark}")
    return {
        "counts": asdict(counts), "source_sha256": source_hash(config.data.source),
        "heldout_sha256": source_hash(config.data.heldout.source) if config.data.heldout else None,
        "answer_ends": list(ends.ids), "remarks": remarks,
    }  # fmt: skip


def describe_ends(ids: Sequence[int], ignored: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return in words where answers end, and what was left out of account."""
    lines = [f"answers end at {' or '.join(f'{tokenizer.convert_ids_to_tokens(one)} ({one})' for one in ids)}"]
    if ignored:
        lines.append(
            f"a model's generation settings name {', '.join(map(str, ignored))} as ends of answers, which are no special "
            "tokens of the tokenizer: left out"
        )
    return lines


def require_same_source(config: RunConfig, prepared: Facts) -> None:
    """Raise if the files of the rows were changed since they were read.

    Raises:
        ValueError: naming the files and what to do.
    """
    sources: dict[str, SourceConfig] = {"data.source": config.data.source}
    if config.data.heldout is not None:
        sources["data.heldout.source"] = config.data.heldout.source
    for key, source in sources.items():
        now = source_hash(source)
        if now is not None and now != prepared["source_sha256" if key == "data.source" else "heldout_sha256"]:
            assert source.kind == "files"
            raise ValueError(
                f"{key}.path {source.path} was changed since this run read it; give the run another name (name=...), or delete "
                "its folder to begin again"
            )


def finetune(role: Role, config: RunConfig, run_dir: RunDir, models: Models) -> Facts:
    """Train a role's model on the data itself, as the paper's teachers are."""
    fitting = models.side(role).finetune
    assert fitting is not None
    task = TrainingTask(
        name=f"finetune_{role}",
        model=models.begun(role),
        tokenizer=str(models.tokenizer_folder),
        lora=None,
        loss=HardLabelLoss(kind="hard_label"),
        train=fitting.train,
        examples=str(run_dir.path / "data" / "train.arrow"),
        store=None,
        top_k=config.scores.top_k,
        wait_seconds=config.scores.wait_seconds,
        seed=config.seed,
        threads=int(max(1, fitting.workers.cpus)),
        gpu=fitting.workers.gpus > 0,
        metrics=str(run_dir.path / "metrics"),
        output=str(models.finetuned_folder(role)),
        run=config.name,
        tracking=config.tracking,
    )
    return train_model(task, fitting.workers, run_dir.path / "checkpoints")


def train(config: RunConfig, run_dir: RunDir, models: Models, store: ScoreStore | None) -> Facts:
    """Distil the student from the store, which may still be growing."""
    task = distillation_task(config, run_dir.path, models, store.path if store is not None else None)
    return train_model(task, config.workers, run_dir.path / "checkpoints")


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
        gpu=config.workers.gpus > 0,
        metrics=str(folder / "metrics"),
        output=str(models.student_folder),
        run=config.name,
        tracking=config.tracking,
        dtype=models.export_dtype(),
        teacher_done=str(result_path(folder, "score")),
    )
