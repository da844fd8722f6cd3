"""The work of each stage that trains or prepares; what it makes goes into the run's folder, what it found into its run_dir."""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from ray.exceptions import RayError
from transformers import PreTrainedTokenizerBase

from actors.evaluation.answers import AnswerComparison, read_heldout_texts
from actors.examples import ExampleFile
from actors.format import plural
from actors.model_cache.hub import HubFiles
from actors.model_cache.nodes import NodeDownloads, nodes_for
from actors.model_cache.object_storage import StoredModelFiles, copied_from
from actors.model_source import ModelSource
from actors.placement import (
    Node,
    ResourceRequest,
    evaluator_need,
    read_nodes,
    replica_request,
    sampler_request,
    teacher_sampler_request,
    worker_request,
)
from actors.score_store.store import ScoreStore
from actors.student.task import TrainingTask
from losses.config import HardLabelLoss
from orchestrator.cluster.logs import ProgressSnapshot
from orchestrator.cluster.progress import logged_progress
from orchestrator.cluster.ray_session import ray_for_tasks
from orchestrator.config.run import RunConfig
from orchestrator.data.counts import DataCounts
from orchestrator.data.dataset import prepare_data
from orchestrator.data.mixture import source_hashes, sources_of
from orchestrator.data.sources import source_hash
from orchestrator.models.model_checks import require_models_fit, row_limits
from orchestrator.models.models import ROLES, Models, Role
from orchestrator.run.cut_student import require_can_be_cut
from orchestrator.run.responses import longest_prompt, require_room_for_answers, training_rows
from orchestrator.run.rollouts import rollout_task
from orchestrator.run.run_dir import Facts, RunDir, result_path
from orchestrator.run.score_identity import pin_revision
from orchestrator.run.training import train_model

logger = logging.getLogger("atkd")

FETCH_PROGRESS_SECONDS = 5.0


def prepare(config: RunConfig, run_dir: RunDir, models: Models) -> Facts:
    """Turn rows into token ids and masks, settle where answers end, and draw the weights of models made from scratch."""
    for role in ROLES:
        models.named(role).require_safetensors()
    require_can_be_cut(models)
    data = run_dir.path / "data"
    counts = prepare_examples(config, models, data)
    tokenizer = models.tokenizer()
    ends = models.settle_answer_ends(tokenizer, sorted(counts.turn_ends, key=lambda end: -counts.turn_ends[end]))
    models.make_scratch_models(tokenizer)
    remarks = [*counts.lines(config.data), *describe_ends(ends.ids, ends.ignored, tokenizer)]
    remarks += require_models_fit(config, models, row_limits(config, data))
    remarks += [merged for role in ROLES if (merged := models.merge_adapter(role))]
    require_room_for_answers(config, models, longest_prompt(ExampleFile(data / "train.arrow")))
    require_references(config, data)
    for line in "\n".join(remarks).splitlines():  # rows that are shown have several
        logger.info(f"prepare: {line}")
    return {
        "counts": asdict(counts), "source_sha256": source_hashes(config.data),
        "answer_ends": list(ends.ids), "remarks": remarks,
    }  # fmt: skip


def prepare_examples(config: RunConfig, models: Models, folder: Path) -> DataCounts:
    """Turn rows into token ids and masks in a folder, on the cluster where ``data.cluster_tasks`` says so."""
    on_cluster = config.data.cluster_tasks is not None
    with ray_for_tasks() if on_cluster else nullcontext():
        return prepare_data(config.data, models.tokenizer_for, folder, on_cluster)


def require_references(config: RunConfig, data: Path) -> None:
    """Raise if a response to which answers are to be compared has no answer that ``evaluate.answer_pattern`` finds.

    Raises:
        ValueError: naming the first such row.
    """
    rows = ExampleFile(data / "heldout.arrow").rows.tolist()
    texts = read_heldout_texts(data / "heldout_texts.jsonl", rows)[: config.evaluate.generate_rows]
    AnswerComparison(config.evaluate.answer_pattern).require_answers(texts)


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
    for key, source in sources_of(config.data).items():
        now = source_hash(source)
        if now is not None and now != prepared["source_sha256"].get(key):
            assert source.kind == "files"
            raise ValueError(
                f"{key}.path {source.path} was changed since this run read it; give the run another name (name=...), or delete "
                "its folder to begin again"
            )


def fetch_models(config: RunConfig, run_dir: RunDir, models: Models, stages: Sequence[str]) -> None:
    """Bring models of the hub and of object storage that stages load to the nodes on which they may be, if there is work to do.

    Each node's cache gets them once, and replicas, workers and evaluators find them there. Other folders need nothing.

    Raises:
        ValueError: naming the key of a model that cannot be fetched, and what would do.
    """
    requests: dict[tuple[Role, ModelSource], list[ResourceRequest]] = {}
    for stage in stages:
        for role, source, request in loads_of(stage, config, models) if run_dir.result(stage) is None else ():
            if not Path(source.name).is_dir() or copied_from(Path(source.name)) is not None:
                requests.setdefault((role, source), []).append(request)
    for (role, source), wanted in requests.items():
        with downloads_of(source, nodes_for(wanted, read_nodes())) as downloads:
            if downloads.fetching:
                _fetch(role, source, downloads, run_dir)


def downloads_of(source: ModelSource, nodes: Sequence[Node]) -> NodeDownloads:
    """Return the files of a model of the hub, or of which this node has a copy, on several nodes."""
    if (stored := copied_from(Path(source.name))) is not None:
        return NodeDownloads(StoredModelFiles, (stored, source.name), nodes)
    commit = pin_revision(source).revision
    assert commit is not None, "a model of the hub has one"
    return NodeDownloads(HubFiles, (source, commit), nodes)


def loads_of(stage: str, config: RunConfig, models: Models) -> list[tuple[Role, ModelSource, ResourceRequest]]:
    """Return which models a stage loads on the cluster, by whose request of resources."""
    if stage == "respond" and config.responses is not None and config.writer_engine is not None:
        writer = config.responses.writer
        return [(writer, models.ready(writer), replica_request(config.writer_engine))]
    if stage in ("calibrate", "score"):
        return [("teacher", models.ready("teacher"), replica_request(config.teacher.engine))]
    if stage == "train":
        loads: list[tuple[Role, ModelSource, ResourceRequest]] = [
            ("student", models.ready("student"), worker_request(config.workers))
        ]
        if config.rollouts is not None:
            loads.append(("student", models.ready("student"), sampler_request(config.sampler_engine)))
            loads.append(("teacher", models.ready("teacher"), replica_request(config.teacher.engine)))
            if config.rollouts.wire == "hidden":  # workers read its output head
                loads.append(("teacher", models.ready("teacher"), worker_request(config.workers)))
        if config.teacher_sampler_engine is not None:
            loads.append(("teacher", models.ready("teacher"), teacher_sampler_request(config.teacher_sampler_engine)))
        return loads
    if stage == "evaluate":
        measured = [role for role in ROLES if role == "student" or config.loads_teacher_to_measure]
        return [(role, models.ready(role), evaluator_need(config.evaluate)) for role in measured]
    fitted = [(role, fit) for role in ROLES if stage == f"finetune_{role}" and (fit := models.side(role).finetune) is not None]
    return [(role, models.begun(role), worker_request(fit.workers, f"{role}.finetune.workers")) for role, fit in fitted]


def _fetch(role: Role, source: ModelSource, downloads: NodeDownloads, run_dir: RunDir) -> None:
    """Fetch, and say how far it is."""
    started, places = time.monotonic(), plural(len(downloads.fetching), "node")

    def look() -> ProgressSnapshot | None:
        with suppress(RayError):
            came, all_in_all = downloads.progress()
            of = f" of {all_in_all / 1e9:.1f}" if all_in_all else ""
            line = f"{role}: {source.name}, {came / 1e9:.1f}{of} GB fetched to {places}, {time.monotonic() - started:.0f} s"
            return ProgressSnapshot(came, line, came, max(all_in_all, 1))
        return None

    logger.info(f"{role}: fetching {source.name} to the cache of {places}")
    try:
        with logged_progress(f"fetch {role}", look, FETCH_PROGRESS_SECONDS):
            fetched = downloads.fetch()
    except RuntimeError as error:
        if (stored := copied_from(Path(source.name))) is not None:
            raise ValueError(
                f"{role}.model.name {stored.address} could not be copied to {source.name} {error}; the right to read it in that "
                "node's own environment, or a folder that all nodes see, would do"
            ) from error
        raise ValueError(
            f"{role}.model.name {source.name!r} is not in the cache of every node, and could not be fetched {error}; a network "
            f"there, HF_TOKEN for a model that asks who fetches it, or a folder that all nodes see ({role}.model.name=/a/folder) "
            "would do"
        ) from error
    count, seconds = sum(one.bytes for one in fetched), time.monotonic() - started
    logger.info(f"{role}: {source.name} fetched to {places}, {count / 1e9:.1f} GB in {seconds:.0f} s")
    run_dir.event("model_fetched", role=role, model=source.name, nodes=len(fetched), bytes=count, seconds=seconds)


def finetune(role: Role, config: RunConfig, run_dir: RunDir, models: Models) -> Facts:
    """Train a role's model on the data itself, as the paper's teachers are."""
    fitting = models.side(role).finetune
    assert fitting is not None
    task = finetuning_task(role, config, run_dir.path, models)
    return train_model(task, fitting.workers, run_dir.checkpoints(config.checkpoints))


def finetuning_task(role: Role, config: RunConfig, folder: Path, models: Models) -> TrainingTask:
    """Return the fine-tuning of a role's model in a run whose folder is ``folder``."""
    fitting = models.side(role).finetune
    assert fitting is not None
    return TrainingTask(
        name=f"finetune_{role}",
        model=models.begun(role),
        tokenizer=str(models.tokenizer_folder_of(role)),
        lora=None,
        loss=HardLabelLoss(kind="hard_label"),
        train=fitting.train,
        examples=str(rows_of(role, "train", folder)),
        store=None,
        top_k=config.scores.top_k,
        wait_seconds=config.scores.wait_seconds,
        seed=config.seed,
        threads=int(max(1, fitting.workers.cpus)),
        gpu=fitting.workers.gpus > 0,
        metrics=str(folder / "metrics"),
        output=str(models.finetuned_folder(role)),
        mirror=config.mirror,
        run=config.name,
        tracking=config.tracking,
        # The teacher is what is served: rounded later, its weights would be further from it than 16-bit arithmetic is.
        dtype=config.teacher.engine.dtype if role == "teacher" else "float32",
    )


def rows_of(role: Role, split: str, folder: Path) -> Path:
    """Return the rows of a split as a role's model reads them: classifiers may have tokens of their own."""
    own = folder / "data" / f"{role}_{split}.arrow"
    return own if own.exists() else folder / "data" / f"{split}.arrow"


def train(config: RunConfig, run_dir: RunDir, models: Models, store: ScoreStore | None) -> Facts:
    """Distil the student from the store, which may still be growing."""
    task = distillation_task(config, run_dir.path, models, store.place if store is not None else None)
    return train_model(task, config.workers, run_dir.checkpoints(config.checkpoints))


def distillation_task(config: RunConfig, folder: Path, models: Models, store: str | None) -> TrainingTask:
    """Return the training of the student of a run whose folder is ``folder``."""
    return TrainingTask(
        name="train",
        model=models.ready("student"),
        tokenizer=str(models.tokenizer_folder),
        lora=config.student.lora,
        loss=config.loss,
        train=config.train,
        examples=str(training_rows(config, folder)),
        store=store,
        top_k=config.scores.top_k,
        wait_seconds=config.scores.wait_seconds,
        seed=config.seed,
        threads=int(max(1, config.workers.cpus)),
        gpu=config.workers.gpus > 0,
        metrics=str(folder / "metrics"),
        output=str(models.student_folder),
        mirror=config.mirror,
        run=config.name,
        tracking=config.tracking,
        dtype=models.export_dtype(),
        rollouts=rollout_task(config, folder, folder, models),
        teacher_done=str(result_path(folder, "score")),
    )
