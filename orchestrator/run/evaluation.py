"""The evaluation stage: teacher, student before and student after, each measured by one Ray task, and their table."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from actors.config.models import EvaluateConfig
from actors.environment import task_environment
from actors.evaluation.answers import GeneratedAnswer
from actors.evaluation.evaluator import Evaluation, Metrics, evaluate_from_scores, evaluate_model
from actors.evaluation.token_view import TokenView
from actors.files import write_atomically
from actors.model_source import ModelSource
from actors.score_store.store import ScoreStore
from actors.teacher.reference_pass import count_weights
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models, config_of
from orchestrator.run.results_table import METRICS, MODEL_NAMES, ComparisonTable, TableRow, metric_rows, write_table
from orchestrator.run.run_dir import Facts, RunDir

logger = logging.getLogger("atkd")


def evaluate(config: RunConfig, run_dir: RunDir, models: Models, heldout_store: ScoreStore) -> Facts:
    """Measure the three models on the held-out rows and write their table; a model measured before is not measured again."""
    sources = dict(zip(MODEL_NAMES, (models.ready("teacher"), models.ready("student"), models.distilled()), strict=True))
    folder = run_dir.path / "evaluation"
    folder.mkdir(exist_ok=True)
    missing = {name: source for name, source in sources.items() if not (folder / f"{name}.json").exists()}
    if config.evaluate.teacher == "scores" and (teacher := missing.pop("teacher", None)) is not None:
        parameters = count_weights(config_of(teacher), teacher.trust_remote_code)
        rows, store = str(run_dir.path / "data" / "heldout.arrow"), str(heldout_store.path)
        keep_evaluation(run_dir, "teacher", evaluate_from_scores(rows, store, config.scores.top_k, parameters))
    settings, top_k, tokenizer = config.evaluate, config.scores.top_k, models.tokenizer_source()
    running = {
        name: evaluate_remote(source, run_dir.path, tokenizer, heldout_store, settings, top_k) for name, source in missing.items()
    }
    for name, reference in running.items():
        keep_evaluation(run_dir, name, _evaluated(name, reference))
    table = comparison_table(*(read_evaluation(folder / f"{name}.json") for name in MODEL_NAMES))
    write_table(run_dir.path, table)
    return {"table": [asdict(row) for row in table.rows]}


def keep_evaluation(run_dir: RunDir, name: str, evaluation: Evaluation) -> None:
    """Write down and log what was measured of a model."""
    write_evaluation(run_dir.path / "evaluation" / f"{name}.json", evaluation)
    run_dir.event("model_evaluated", model=name, **asdict(evaluation.metrics))
    logger.info(f"evaluate: {name.replace('_', ' ')} done, held-out loss {evaluation.metrics.heldout_loss:.4f}")


def _evaluated(name: str, reference: ray.ObjectRef) -> Evaluation:
    try:
        found: Evaluation = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, torch.OutOfMemoryError):
            remedy = "evaluate.teacher=scores, or " if name == "teacher" else ""
            raise ValueError(
                f"evaluate: one GPU does not hold the {name.replace('_', ' ')} ({error.cause}): {remedy}"
                "evaluate.precision=bfloat16, or evaluate.gpus=0, would do"
            ) from error
        raise
    return found


def evaluate_remote(
    source: ModelSource, run_path: Path, tokenizer: ModelSource, store: ScoreStore, settings: EvaluateConfig, top_k: int
) -> ray.ObjectRef:
    """Begin to measure a model in a Ray task that holds what the configuration gives the evaluator; see ``evaluate_model``."""
    task = ray.remote(evaluate_model).options(
        name=f"evaluate {Path(source.name).name}",
        num_cpus=settings.cpus,
        num_gpus=settings.gpus,
        runtime_env={"env_vars": task_environment(settings.cpus, settings.gpus > 0)},
    )
    data = run_path / "data"
    return task.remote(
        source, tokenizer, str(data / "heldout.arrow"), str(store.path), str(data / "heldout_texts.jsonl"), settings, top_k
    )


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write metrics, answers and token views as JSON, in one rename."""
    write_atomically(path, json.dumps(asdict(evaluation), indent=1, ensure_ascii=False).encode())


def read_evaluation(path: Path) -> Evaluation:
    """Return what ``write_evaluation`` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Evaluation(
        Metrics(**content["metrics"]), tuple(GeneratedAnswer(**answer) for answer in content["answers"]),
        tuple(read_view(view) for view in content.get("views", ())),
    )  # fmt: skip


def read_view(content: Mapping[str, Any]) -> TokenView:
    """Return a token view from the JSON it was written as."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    return TokenView(**fields)


def comparison_table(teacher: Evaluation, before: Evaluation, after: Evaluation) -> ComparisonTable:
    """Return the table of the three models."""
    evaluations = (teacher, before, after)
    metrics = [{name: getattr(evaluation.metrics, name) for name, _, _ in METRICS} for evaluation in evaluations]
    return ComparisonTable(metric_rows(metrics), exact_match_by_task([evaluation.answers for evaluation in evaluations]))


def exact_match_by_task(answers: Sequence[Sequence[GeneratedAnswer]]) -> tuple[TableRow, ...]:
    """Return the share of right answers of each model, by kind of task, in the order of their names.

    The number of answers stands in the label. Answers of no named task are left out.
    """
    tasks = sorted({answer.task for of_model in answers for answer in of_model if answer.task is not None})
    rows = []
    for task in tasks:
        right = [[answer.correct for answer in of_model if answer.task == task] for of_model in answers]
        shares = tuple(sum(of_model) / len(of_model) if of_model else None for of_model in right)
        rows.append(TableRow(task, f"{task} ({max(len(of_model) for of_model in right)})", "share", shares))
    return tuple(rows)
