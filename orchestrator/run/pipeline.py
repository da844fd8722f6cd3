"""The pipeline of a run: tokenize the rows, score them with the teacher once, distil the student, evaluate and export it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from orchestrator.classification.onnx_model import add_onnx, require_onnx
from orchestrator.classification.preparation import prepare_run
from orchestrator.classification.soft_labels import make_soft_labels
from orchestrator.cluster.environment import note_cluster, note_process
from orchestrator.cluster.ray_session import ray_for, require_machine
from orchestrator.config.run import RunConfig
from orchestrator.models.models import ROLES, Models
from orchestrator.run.benchmarking import (
    benchmark,
    benchmarks_missing,
    renew_exported_card,
    require_benchmarks,
    require_chat_template,
    students_results,
)
from orchestrator.run.cut_student import cut_student
from orchestrator.run.evaluation import evaluate
from orchestrator.run.export import export
from orchestrator.run.judging import judge, require_judge
from orchestrator.run.responses import respond
from orchestrator.run.rollouts import RolloutStage, rollout_task, served_teacher
from orchestrator.run.run_dir import RunDir
from orchestrator.run.scoring import ScoringStage, calibrate
from orchestrator.run.stages import fetch_models, finetune, prepare, require_same_source, train

STAGES = ("prepare", "finetune", "respond", "score", "train", "evaluate", "export")


def run(config: RunConfig, until: str = "export") -> Path:
    """Run all stages up to ``until``, skipping those that are done; return the run's folder."""
    assert until in STAGES
    with RunDir.open(config) as run_dir:
        if until != "prepare" and needs_devices(config, run_dir):
            require_machine(config)  # before the rows are read, which may take long
        if until in ("evaluate", "export"):
            require_judge(config, run_dir)
            require_benchmarks(config, run_dir)
        if until == "export" and config.export.onnx and run_dir.result("onnx") is None:
            require_onnx()
        overlap = config.scores.overlap and config.rollouts is None and until != "score"
        for finished in run_stages(config, run_dir, overlap):
            if finished == until:
                break
        return run_dir.path


def run_stages(config: RunConfig, run_dir: RunDir, overlap: bool) -> Iterator[str]:
    """Run stage after stage; yield the name of each once its result is recorded."""
    note_process(run_dir)
    models = Models(config, run_dir.path)
    read = partial(prepare_run, config, run_dir.path, models) if config.classes else partial(prepare, config, run_dir, models)
    prepared = run_dir.stage("prepare", read)
    require_same_source(config, prepared)
    if not config.classes:
        require_chat_template(config, models)
    yield "prepare"

    with ray_for(config) if needs_devices(config, run_dir) else nullcontext():
        note_cluster(run_dir)
        if config.teacher.model.kind == "soft_labels":
            image_shape = tuple(prepared["counts"]["image_shape"])
            run_dir.stage("soft_labels", partial(make_soft_labels, config, run_dir.path, models, image_shape))
        for role in ROLES:
            if models.side(role).model.kind == "cut":
                run_dir.stage("cut", partial(cut_student, run_dir, models))
            if models.side(role).finetune is not None:
                fetch_models(config, run_dir, models, [f"finetune_{role}"])
                run_dir.stage(f"finetune_{role}", partial(finetune, role, config, run_dir, models))
        yield "finetune"

        if config.responses is not None:
            fetch_models(config, run_dir, models, ["respond"])
            run_dir.stage("respond", partial(respond, config, run_dir, models))
        yield "respond"

        if config.teacher.calibrate:
            fetch_models(config, run_dir, models, ["calibrate"])
            run_dir.stage("calibrate", partial(calibrate, config, run_dir, models))
        scoring = ScoringStage(config, run_dir, models)
        scored = [] if scoring.complete else ["score"]
        if not overlap:
            fetch_models(config, run_dir, models, scored)
            scoring.run()
            yield "score"
        fetch_models(config, run_dir, models, [*scored, "train"])
        with scoring.in_background() if overlap else nullcontext(), rollouts_of(config, run_dir, models):
            run_dir.stage("train", partial(train, config, run_dir, models, scoring.training_store))
        yield "train"

        fetch_models(config, run_dir, models, ["evaluate"])
        run_dir.stage("evaluate", partial(evaluate, config, run_dir, models, scoring.heldout_store))
        if config.evaluate.benchmarks is not None:
            benchmark(config, run_dir, models)
    if config.evaluate.judge is not None:
        judge(config, run_dir)  # the cluster's devices are given back by now: a judge needs none
    yield "evaluate"

    exported = run_dir.result("export") is not None
    figures = students_results(run_dir.path) if config.evaluate.benchmarks is not None else ()
    run_dir.stage("export", partial(export, config, run_dir, models, scoring.training_store, figures))
    if exported and config.evaluate.benchmarks is not None:
        renew_exported_card(config, run_dir, models)
    if config.export.onnx:
        run_dir.stage("onnx", partial(add_onnx, models.distilled(), run_dir.path / "data" / "heldout.arrow"))
    yield "export"


def needs_devices(config: RunConfig, run_dir: RunDir) -> bool:
    """Whether anything is left to do that the cluster does."""
    return run_dir.result("evaluate") is None or benchmarks_missing(config, run_dir)


def rollouts_of(config: RunConfig, run_dir: RunDir, models: Models) -> AbstractContextManager[None]:
    """Return what writes rows beside the training of a run; nothing where there are none, or it is trained."""
    if (task := rollout_task(config, run_dir.path, run_dir.path, models)) is None or run_dir.result("train") is not None:
        return nullcontext()
    stage = RolloutStage(config, run_dir.path, models, task, config.seed)
    serve_teacher = partial(served_teacher, config, run_dir, models)
    return stage.in_background(serve_teacher, run_dir.path / "metrics", run_dir.path / "logs")
