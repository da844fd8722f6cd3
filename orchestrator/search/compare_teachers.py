"""``compare`` under several teachers: the same student and rows, every arm and seed under each, and what size does to it."""

import json
import shutil
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from actors.config.places import within
from actors.examples import ExampleFile
from actors.files import whole_folder
from actors.score_store.store import ScoreStore
from actors.teacher.reference_pass import count_weights
from orchestrator.cluster.logs import prefixed
from orchestrator.config.load import ConfigError, validate
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models, vocab_size_of
from orchestrator.run.pipeline import run
from orchestrator.run.run_dir import RunDir
from orchestrator.search.analysis import TaughtBy
from orchestrator.search.compare import compare
from orchestrator.search.ledger import read_ledger


def compare_teachers(config: RunConfig) -> list[TaughtBy]:
    """Make the comparison under each teacher in a run of its own, resuming where an earlier one stopped.

    Raises:
        ConfigError: naming the teacher whose changes the configuration refuses.
        ValueError: if the teachers do not read the same rows or would not teach the same student; and as ``compare``.
    """
    by_teacher = configs_by_teacher(config)
    first = next(iter(by_teacher))
    with RunDir.open(config):
        for teacher, its_config in by_teacher.items():
            with prefixed(teacher):
                run(its_config, "prepare")
            require_same_rows(by_teacher[first], its_config, first, teacher)
        for teacher, its_config in by_teacher.items():
            if teacher != first and its_config.student.finetune is not None:
                share_finetuned_student(by_teacher[first], its_config, first)
            with prefixed(teacher):
                compare(its_config)
        return [taught_by(teacher, its_config) for teacher, its_config in by_teacher.items()]


def configs_by_teacher(config: RunConfig) -> dict[str, RunConfig]:
    """Return, for each teacher, the configuration of its run: all stores stand where the run's own would.

    Raises:
        ConfigError: naming the teacher whose changes the configuration refuses.
    """
    found = {}
    for teacher, changes in config.compare.teachers.items():
        tree = config.model_dump(mode="json")
        tree["teacher"] = laid_over(tree["teacher"], changes)
        tree["compare"] |= {"teachers": {}, "name": "compare"}
        tree["scores"]["root"] = config.score_root
        try:
            found[teacher] = validate(tree | {"name": teacher, "output": within(config.place, config.compare.name)})
        except ConfigError as error:
            raise ConfigError(f"compare.teachers.{teacher}: {error}") from None
    return found


def laid_over(base: Any, changes: Any) -> Any:
    """Return a tree with changes laid over it, key by key; a section that says its ``kind`` stands for itself."""
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping) or "kind" in changes:
        return changes
    return {**base, **{key: laid_over(base.get(key), value) for key, value in changes.items()}}


def require_same_rows(first: RunConfig, other: RunConfig, first_name: str, name: str) -> None:
    """Raise if two teachers would not have the same rows and the same student.

    Raises:
        ValueError: naming both teachers, what differs and what would do.
    """
    if rows_of(first) != rows_of(other):
        raise ValueError(
            f"compare.teachers: {first_name} and {name} cut the rows into other tokens, and a loss a token cannot be compared; "
            "teachers of one family, with one tokenizer, would do"
        )
    begun = [Models(one, one.run_dir).begun("student") for one in (first, other)]
    widths = [vocab_size_of(source) for source in begun]
    if widths[0] != widths[1]:
        raise ValueError(
            f"compare.teachers: the student made from scratch knows {widths[0]} tokens under {first_name} and {widths[1]} under "
            f"{name}, as its teacher does; a pretrained student, or teachers of one vocab_size, would do"
        )


def rows_of(config: RunConfig) -> list[str]:
    """Return what names the rows of a run, tokens and masks included."""
    return [ExampleFile(config.run_dir / "data" / f"{split}.arrow").hash for split in ("train", "heldout")]


def share_finetuned_student(first: RunConfig, other: RunConfig, first_name: str) -> None:
    """Give a run the student that was fine-tuned under the first teacher: it is the same, and need not be fine-tuned again."""
    theirs, ours = (Models(one, one.run_dir).finetuned_folder("student") for one in (first, other))
    with RunDir.open(other) as run_dir:
        if run_dir.result("finetune_student") is not None:
            return
        shutil.rmtree(ours, ignore_errors=True)
        with whole_folder(ours) as copying:
            shutil.copytree(theirs, copying)
        run_dir.finish("finetune_student", {"copied_from": first_name, "seconds": 0.0})


def taught_by(teacher: str, config: RunConfig) -> TaughtBy:
    """Return what came of the comparison under one teacher."""
    source = Models(config, config.run_dir).ready("teacher")
    shape = AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=source.trust_remote_code)
    search = read_ledger(config.run_dir / config.compare.name / "ledger.jsonl")
    weights = count_weights(shape, source.trust_remote_code, classifies=config.classes > 0)
    return TaughtBy(teacher, weights, heldout_loss(config), search)


def heldout_loss(config: RunConfig) -> float:
    """Return the teacher's own loss on the held-out rows, in nats per target, as it scored them."""
    store = ScoreStore(json.loads((config.run_dir / "scores.json").read_text())["heldout"])
    targets = [len(store.uncertainty_at(position)) for position in range(store.rows)]
    losses = [store.teacher_loss_at(position) * count for position, count in enumerate(targets)]
    return sum(losses) / sum(targets)
