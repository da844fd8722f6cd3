"""The doctor: proves on a few rows that the teacher's scores would be right, before a teacher scores them all.

It measures here; ``checks`` draws the conclusions.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict

from transformers import PreTrainedTokenizerBase

from actors.engines.base import EngineFactory, TeacherSpec
from actors.engines.build import build_engine
from actors.examples import ExampleFile, spread_over_lengths
from actors.model_source import ModelSource
from actors.records import Example
from actors.student.self_distillation import AttentionFound, SelfDistillationCheck, measure, measure_attention
from orchestrator.cluster.ray_session import ray_for
from orchestrator.cluster.run_copies import PassingFolder
from orchestrator.config.run import RunConfig
from orchestrator.data.tokenizers import load_tokenizer
from orchestrator.doctor.checks import check_attention, check_pair, check_scores, check_tokens
from orchestrator.doctor.class_doctor import diagnose_classes
from orchestrator.doctor.run_checks import check_devices, check_ends, check_export, check_rows
from orchestrator.doctor.serving import folder_of_doctor, measured_on, on_gpu, rows_path, score_probe
from orchestrator.models.models import ROLES, Models, ids_below, named_below, vocab_size_of
from orchestrator.run.benchmarking import require_benchmarks
from orchestrator.run.judging import require_judge
from orchestrator.run.pipeline import run_stages
from orchestrator.run.run_dir import RunDir
from orchestrator.run.score_identity import pin_revision
from orchestrator.run.score_parity import TOLERANCES, Finding

logger = logging.getLogger("atkd")

PROBE_ROWS = 8


def diagnose(config: RunConfig, engine_factory: EngineFactory = build_engine) -> list[Finding]:
    """Run the stages up to the fine-tuned teacher, and check the scores of a few rows.

    The run's score stores are neither opened nor made; what is scored here is deleted.

    Raises:
        TeacherFailed: if the teacher cannot be served at all.
        ValueError: as the stages ``prepare`` and ``fit`` do; or if the run's judge or benchmarks could not be asked.
    """
    devices = check_devices(config)
    if devices.state != "ok":
        return [devices]
    if not config.classes and all(side.model.kind == "pretrained" for side in (config.teacher, config.student)):
        models = Models(config, config.run_dir)
        teacher, student = (models.own_tokenizer(role) for role in ROLES)
        if differing := check_pair(teacher, student):
            return [devices, differing]
    with RunDir.open(config) as run_dir:
        require_judge(config, run_dir)
        require_benchmarks(config, run_dir)
        stages = run_stages(config, run_dir, overlap=False)
        while next(stages) != "finetune":  # the Ray that stages begin lives as long as they are not let go
            pass
        diagnose_rest = diagnose_classes if config.classes else _diagnose_finetuned
        findings = [devices, *diagnose_rest(config, run_dir, Models(config, run_dir.path), engine_factory)]
        run_dir.event("diagnosed", findings=[asdict(finding) for finding in findings])
        return findings


def _diagnose_finetuned(config: RunConfig, run_dir: RunDir, models: Models, engine_factory: EngineFactory) -> list[Finding]:
    splits = [ExampleFile(run_dir.path / "data" / f"{split}.arrow") for split in ("heldout", "train")]
    rows = [row for split in splits for row in spread_over_lengths(split, PROBE_ROWS // 2)]
    teacher_vocab, student_vocab = (vocab_size_of(models.ready(role)) for role in ROLES)
    tokens = check_tokens(
        models.tokenizer(), *(tokenizer_of(models.ready(role)) for role in ROLES),
        largest_id=max(split.largest_id for split in splits), teacher_vocab=teacher_vocab, student_vocab=student_vocab,
    )  # fmt: skip
    if tokens.state != "ok":
        return [tokens]
    prepared = run_dir.result("prepare")
    assert prepared is not None, "the run was prepared before"
    findings = [tokens, check_rows(config, run_dir.path), check_ends(models, prepared)]
    spec = TeacherSpec(
        engine=config.teacher.engine.model_copy(update={"replicas": 1}),
        model=pin_revision(models.ready("teacher")),
        top_k=config.scores.top_k,
        longest_row=max(int(split.lengths.max()) for split in splits),
        ids_below=named_below(ids_below(models), teacher_vocab),
    )
    logger.info(
        f"doctor: scores {len(rows)} rows with {spec.engine.kind} ({spec.engine.dtype}), and again with a plain forward pass"
    )
    with ray_for(config), folder_of_doctor(config, run_dir.path) as folder:
        found = measure_served(spec, rows, folder, teacher_vocab, engine_factory)
        if isinstance(found, Finding):
            return [*findings, found]
        student = measure_student(config, models.ready("student"), folder)
        findings += [check_export(config, models, run_dir.path), check_attention("student", student)]
    return findings + check_scores(found, TOLERANCES[spec.engine.dtype], teacher_vocab, student_vocab)


def tokenizer_of(source: ModelSource) -> PreTrainedTokenizerBase:
    """Return the tokenizer that stands beside a model."""
    return load_tokenizer(source.name, source.revision, source.trust_remote_code)


def measure_served(
    spec: TeacherSpec, rows: Sequence[Example], folder: PassingFolder, vocab_size: int, engine_factory: EngineFactory
) -> SelfDistillationCheck | Finding:
    """Score rows alone and together in the teacher's pool, and compare with its forward pass; needs Ray.

    The way is that of a run: actor, engine, checks, shards on disk, and back.
    Return a finding where the scores do not pass the checks that every shard passes.
    """
    stores = score_probe(spec, rows, folder, vocab_size, engine_factory)
    if isinstance(stores, Finding):
        return stores
    given = (spec.model, str(rows_path(folder)), *stores)
    measured: SelfDistillationCheck = measured_on(measure, spec.engine.cpus, on_gpu(spec), *given)
    return measured


def measure_student(config: RunConfig, student: ModelSource, folder: PassingFolder) -> AttentionFound:
    """Compare the student's attention with its definition where it would be trained, on rows that ``measure_served`` left."""
    workers = config.workers
    found: AttentionFound = measured_on(
        measure_attention, workers.cpus, workers.gpus > 0, student, str(rows_path(folder))
    )
    return found
