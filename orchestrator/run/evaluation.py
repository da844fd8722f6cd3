"""The evaluation stage: teacher, student before and student after, each measured by one Ray task, and their table."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from actors.config.models import TaskMeasure
from actors.environment import task_environment
from actors.evaluation.answers import GeneratedAnswer, means_by_task
from actors.evaluation.class_evaluator import classes_from_scores, evaluate_classifier
from actors.evaluation.class_metrics import ClassMeasures, ClassView
from actors.evaluation.evaluator import Evaluation, Metrics, evaluate_from_scores, evaluate_model
from actors.evaluation.token_view import TokenView
from actors.files import write_atomically
from actors.model_source import ModelSource
from actors.score_store.store import ScoreStore
from actors.teacher.reference_pass import count_weights
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.models.classifiers import label_names
from orchestrator.models.models import Models, config_of
from orchestrator.run.results_table import MODEL_NAMES, ComparisonTable, Show, TableRow, metric_rows, write_table
from orchestrator.run.run_dir import Facts, RunDir
from orchestrator.run.scoring import temperature_of
from orchestrator.run.stages import rows_of

logger = logging.getLogger("atkd")


def evaluate(config: RunConfig, run_dir: RunDir, models: Models, heldout_store: ScoreStore) -> Facts:
    """Measure the three models on the held-out rows and write their table; a model measured before is not measured again."""
    sources = dict(zip(MODEL_NAMES, (models.ready("teacher"), models.ready("student"), models.distilled()), strict=True))
    folder = run_dir.path / "evaluation"
    folder.mkdir(exist_ok=True)
    missing = {name: source for name, source in sources.items() if not (folder / f"{name}.json").exists()}
    if not config.loads_teacher_to_measure and (teacher := missing.pop("teacher", None)) is not None:
        keep_evaluation(run_dir, "teacher", teacher_by_scores(config, run_dir.path, teacher, heldout_store))
    begin = partial(evaluate_remote, config, run_dir.path, models, heldout_store, temperature_of(config, run_dir.path))
    running = {name: begin(name, source) for name, source in missing.items()}
    for name, reference in running.items():
        keep_evaluation(run_dir, name, _evaluated(name, reference))
    measured = [read_evaluation(folder / f"{name}.json") for name in MODEL_NAMES]
    table = comparison_table(*measured, by_task=config.evaluate.by_task)
    write_table(run_dir.path, table)
    return {"table": [asdict(row) for row in table.rows]}


def teacher_by_scores(config: RunConfig, run_path: Path, teacher: ModelSource, heldout_store: ScoreStore) -> Evaluation:
    """Return what the stored scores of the held-out rows say of a language model, which is not loaded."""
    parameters = count_weights(config_of(teacher), teacher.trust_remote_code)
    store, top_k, data = heldout_store.place, config.scores.top_k, run_path / "data"
    if isinstance(task := config.task, ClassificationTask):
        rows, labels = str(rows_of("teacher", "heldout", run_path)), tuple(label_names(task).values())
        return classes_from_scores(rows, store, str(data / "heldout_rows.jsonl"), labels, task.ordered, top_k, parameters)
    return evaluate_from_scores(str(data / "heldout.arrow"), store, top_k, parameters)


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
    config: RunConfig, run_path: Path, models: Models, store: ScoreStore, teacher_temperature: float, name: str,
    source: ModelSource,
) -> ray.ObjectRef:  # fmt: skip
    """Begin to measure a model in a Ray task that holds what the configuration gives the evaluator.

    See ``evaluate_model`` and ``evaluate_classifier``.
    """
    settings, top_k, data = config.evaluate, config.scores.top_k, run_path / "data"
    options = {
        "name": f"evaluate {Path(source.name).name}", "num_cpus": settings.cpus, "num_gpus": settings.gpus,
        "runtime_env": {"env_vars": task_environment(settings.cpus, settings.gpus > 0)},
    }  # fmt: skip
    if isinstance(task := config.task, ClassificationTask):
        rows = rows_of("teacher" if name == "teacher" else "student", "heldout", run_path)
        labels = tuple(label_names(task).values())
        classifier = ray.remote(evaluate_classifier).options(**options)
        return classifier.remote(
            source, str(rows), store.place, str(data / "heldout_rows.jsonl"), labels, task.ordered, settings, top_k,
            teacher_temperature if name == "teacher" else 1.0,
        )  # fmt: skip
    tokenizer = models.tokenizer_source()
    language_model = ray.remote(evaluate_model).options(**options)
    return language_model.remote(
        source, tokenizer, str(data / "heldout.arrow"), store.place, str(data / "heldout_texts.jsonl"), settings, top_k
    )


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write metrics, answers and token views as JSON, in one rename."""
    write_atomically(path, json.dumps(asdict(evaluation), indent=1, ensure_ascii=False).encode())


def read_evaluation(path: Path) -> Evaluation:
    """Return what ``write_evaluation`` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Evaluation(
        Metrics(**content["metrics"]), tuple(GeneratedAnswer(**answer) for answer in content["answers"]),
        tuple(read_view(view) for view in content.get("views", ())), read_class_view(content.get("classes")),
    )  # fmt: skip


def read_class_view(content: Mapping[str, Any] | None) -> ClassView | None:
    """Return the counts of a classifier's predictions from the JSON they were written as; None where there are none."""
    if content is None:
        return None
    groups = {group: ClassMeasures(**measures) for group, measures in content["groups"].items()}
    return ClassView(tuple(content["labels"]), tuple(tuple(line) for line in content["confusion"]), groups)


def read_view(content: Mapping[str, Any]) -> TokenView:
    """Return a token view from the JSON it was written as."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    return TokenView(**fields)


def comparison_table(
    teacher: Evaluation, before: Evaluation, after: Evaluation, *, by_task: TaskMeasure = "exact_match"
) -> ComparisonTable:
    """Return the table of the three models."""
    evaluations = (teacher, before, after)
    metrics = [asdict(evaluation.metrics) for evaluation in evaluations]
    tasks = answers_by_task([evaluation.answers for evaluation in evaluations], by_task)
    exact, rouge = ((), tasks) if by_task == "rouge_l" else (tasks, ())
    return ComparisonTable(metric_rows(metrics), exact, groups=accuracy_by_group(evaluations), tasks_by_rouge_l=rouge)


def accuracy_by_group(evaluations: Sequence[Evaluation]) -> tuple[TableRow, ...]:
    """Return the accuracy of each classifier by group, in the order of their names, with the number of rows in the label."""
    found = [evaluation.classes.groups if evaluation.classes is not None else {} for evaluation in evaluations]
    return tuple(
        TableRow(group, f"{group} ({found[0][group].rows:,})", "share", tuple(groups[group].accuracy for groups in found))
        for group in sorted(found[0])
    )


def answers_by_task(answers: Sequence[Sequence[GeneratedAnswer]], measure: TaskMeasure) -> tuple[TableRow, ...]:
    """Return exact match or mean Rouge-L of each model's answers, by kind of task, in the order of their names.

    The number of answers stands in the label. Answers of no named task are left out.
    """
    means = [means_by_task(of_model, measure) for of_model in answers]
    counts = [Counter(answer.task for answer in of_model) for of_model in answers]
    show: Show = "share" if measure == "exact_match" else "score"
    return tuple(
        TableRow(
            task, f"{task} ({max(of_model[task] for of_model in counts)})", show, tuple(of_model.get(task) for of_model in means)
        )
        for task in sorted({task for of_model in means for task in of_model})
    )
