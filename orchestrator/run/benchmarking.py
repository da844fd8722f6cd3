"""The benchmarks of a run: what is missing is measured by one Ray task a model, and joins the table.

evaluation/benchmarks/     a file for each task of each model, named by all that it depends on; what stands there stays
evaluation/benchmarks.json the figures that the last start asked for
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from actors.config.benchmarks import BenchmarksConfig, require_installed
from actors.engines.base import engine_environment
from actors.evaluation.benchmark_figures import BenchmarkFigure, BenchmarkResult, read_result, result_of
from actors.evaluation.task_folder import folder_hash, settled_folder
from actors.files import write_atomically
from actors.format import duration, plural
from actors.model_source import ModelSource
from actors.score_store.identity import identity_hash
from orchestrator.cluster.ray_session import ray_for
from orchestrator.config.run import RunConfig
from orchestrator.data.tokenizers import tokenizer_hash
from orchestrator.models.models import Models
from orchestrator.run.export import renew_card
from orchestrator.run.results_table import MODEL_NAMES, Show, TableRow, read_table, write_table
from orchestrator.run.run_dir import RunDir
from orchestrator.run.score_identity import model_identity

logger = logging.getLogger("atkd")

SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "em", "exact_match", "f1", "mc1", "mc2"})
"""Metrics of the harness that are shares of rows, and shown as such."""


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """What a run's models are like by the tasks that were asked for."""

    engine: str
    results: Mapping[str, tuple[BenchmarkResult, ...]]
    """By the names of the models, a result for each task."""

    def lines(self) -> list[str]:
        """Return in sentences what measured, for how long, and what else is to be known."""
        all_results = [one for results in self.results.values() for one in results]
        versions = " and ".join(sorted({one.harness for one in all_results}))
        lines = [
            f"{plural(len(self.results), 'model')} measured by lm-evaluation-harness {versions} with {self.engine}, in "
            f"{duration(sum(one.seconds for one in all_results))}"
        ]
        for name, results in self.results.items():
            lines += [f"{name.replace('_', ' ')}, {one.task}: {remark}" for one in results for remark in one.remarks]
        return lines


def require_benchmarks(config: RunConfig, run_dir: RunDir) -> None:
    """Raise before the run's time is spent if its models could not be measured; nothing where all is measured.

    Raises:
        ValueError: naming what is wrong with packages, folder, tasks or their rows, and what would do.
    """
    settings = config.evaluate.benchmarks
    if settings is None or not benchmarks_missing(config, run_dir):
        return
    require_installed(settings)
    # The harness is an extra, and importing it takes a second, which a run without benchmarks need not spend.
    from actors.evaluation.harness_tasks import require_tasks

    require_tasks(settings)


def require_chat_template(config: RunConfig, models: Models) -> None:
    """Raise if benchmarks are to be asked in turns and the run's tokenizer has no template for them.

    Raises:
        ValueError: with what would do.
    """
    settings = config.evaluate.benchmarks
    if settings is not None and settings.apply_chat_template and models.tokenizer().chat_template is None:
        raise ValueError(
            "evaluate.benchmarks.apply_chat_template is true, but the run's tokenizer has no chat template; "
            "evaluate.benchmarks.apply_chat_template=false, or rows of data.format.kind=chat, would do"
        )


def benchmarks_missing(config: RunConfig, run_dir: RunDir) -> bool:
    """Whether a benchmark that is asked for is not measured yet."""
    if config.evaluate.benchmarks is None:
        return False
    if run_dir.result("evaluate") is None:
        return True
    return bool(_not_there(_wanted(config, run_dir.path, Models(config, run_dir.path))))


def benchmark(config: RunConfig, run_dir: RunDir, models: Models) -> None:
    """Measure what is missing of the benchmarks, on the devices of the evaluation, and put all figures into the table.

    Raises:
        ValueError: if a task cannot be measured by a model, or a model does not fit its device.
    """
    settings = _settings_of(config)
    wanted = _wanted(config, run_dir.path, models)
    missing = _not_there(wanted)
    if missing:
        run_dir.event("stage_started", stage="benchmark")
        started = time.monotonic()
        run_dir.share()
        running = {name: _measure_remote(config, models, name, tasks) for name, tasks in missing.items()}
        for name, reference in running.items():
            seconds = _measured(name, reference)
            logger.info(f"benchmark: {name.replace('_', ' ')} done in {duration(seconds)}: {', '.join(missing[name])}")
        run_dir.gather()
    results = {name: tuple(read_result(path) for path, _ in tasks.values()) for name, tasks in wanted.items()}
    found = Benchmarks(settings.engine, results)
    write_benchmarks(run_dir.path, found)
    write_table(run_dir.path, replace(read_table(run_dir.path), benchmarks=benchmark_rows(found)))
    if missing:
        for line in found.lines():
            logger.info(f"benchmark: {line}")
        run_dir.finish("benchmark", {"measured": _names(missing), "seconds": round(time.monotonic() - started, 2)})
    else:
        logger.info("benchmark: done before")


def benchmark_again(config: RunConfig) -> None:
    """Measure a run that was evaluated before by these benchmarks; of an exported student the model card is renewed.

    Raises:
        ValueError: if there are no benchmarks, the run is not evaluated yet, or a task cannot be measured.
    """
    _settings_of(config)
    if not (config.run_dir / "config.yaml").is_file():
        raise ValueError(f"there is no run in {config.place}; the command run makes it, and measures its models")
    with RunDir.open(config) as run_dir:
        if run_dir.result("evaluate") is None:
            raise ValueError(f"the run in {config.place} is not evaluated yet; the command evaluate does it")
        require_benchmarks(config, run_dir)
        models = Models(config, run_dir.path)
        require_chat_template(config, models)
        with ray_for(config) if benchmarks_missing(config, run_dir) else nullcontext():
            benchmark(config, run_dir, models)
        if run_dir.result("export") is not None:
            renew_exported_card(config, run_dir, models)


def renew_exported_card(config: RunConfig, run_dir: RunDir, models: Models) -> None:
    """Write the benchmarks' figures into the model card that an earlier start wrote; what its owner added to it stays."""
    if not renew_card(models.student_folder, config.name, read_table(run_dir.path), students_results(run_dir.path)):
        logger.warning(f"export: the model card in {models.student_folder} is not as it was written, and is left alone")


def students_results(run: Path) -> tuple[BenchmarkResult, ...]:
    """Return the results of the student after distillation; none where it was not measured."""
    found = read_benchmarks(run)
    return () if found is None else found.results.get(MODEL_NAMES[-1], ())


def benchmark_rows(found: Benchmarks) -> tuple[TableRow, ...]:
    """Return the rows of the table: each figure, and its standard error below it where there is one."""
    by_model = {
        name: {(one.task, one.name): one for result in results for one in result.figures}
        for name, results in found.results.items()
    }  # fmt: skip
    keys = dict.fromkeys(key for figures in by_model.values() for key in figures)
    return tuple(row for key in keys for row in _rows_of([by_model.get(name, {}).get(key) for name in MODEL_NAMES]))


def write_benchmarks(run: Path, found: Benchmarks) -> None:
    """Write ``evaluation/benchmarks.json``."""
    write_atomically(run / "evaluation" / "benchmarks.json", json.dumps(asdict(found), indent=1, ensure_ascii=False).encode())


def read_benchmarks(run: Path) -> Benchmarks | None:
    """Return what ``write_benchmarks`` wrote; None where nothing was measured."""
    path = run / "evaluation" / "benchmarks.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    results = {name: tuple(result_of(one) for one in kept) for name, kept in content["results"].items()}
    return Benchmarks(content["engine"], results)


def _rows_of(figures: list[BenchmarkFigure | None]) -> Iterator[TableRow]:
    """Yield the row of one metric of one task, and that of its standard error."""
    first = next(one for one in figures if one is not None)
    show: Show = "share" if first.metric in SHARES else "score"
    shots = "" if first.shots is None else f"{plural(first.shots, 'shot')}, "
    name = f"{first.task}_{first.metric}_{first.filter}"
    label = f"{first.task}: {first.name} ({shots}{plural(first.rows, 'row')})"
    yield TableRow(name, label, show, tuple(None if one is None else one.value for one in figures))
    if first.stderr is not None:
        errors = tuple(None if one is None else one.stderr for one in figures)
        yield TableRow(f"{name}_stderr", f"{first.task}: its standard error", show, errors)


Wanted = dict[str, dict[str, tuple[Path, dict[str, Any]]]]
"""For each model and task, the file of its result, and all that it depends on."""


def _wanted(config: RunConfig, run: Path, models: Models) -> Wanted:
    settings = _settings_of(config)
    shared = {
        **settings.model_dump(mode="json", exclude={"tasks", "folder", "models", "batch_rows", "kv_cache_mib"}),
        "folder": folder_hash(settled_folder(settings.folder)), "tokenizer": tokenizer_hash(models.tokenizer()),
        "dtype": config.evaluate.precision, "harness": _installed_version(),
    }  # fmt: skip
    folder, sources = run / "evaluation" / "benchmarks", _sources(models)
    wanted: Wanted = {}
    for name in settings.models:
        identity = {"model": _identity(sources[name], _stamps(sources[name])), **shared}
        identities = {task: {"task": task, **identity} for task in settings.tasks}
        wanted[name] = {task: (folder / f"{identity_hash(one)[:16]}.json", one) for task, one in identities.items()}
    return wanted


def _not_there(wanted: Wanted) -> Wanted:
    """Return what is wanted and not measured yet."""
    left = {name: {task: at for task, at in tasks.items() if not at[0].exists()} for name, tasks in wanted.items()}
    return {name: tasks for name, tasks in left.items() if tasks}


def _measure_remote(
    config: RunConfig, models: Models, name: str, tasks: Mapping[str, tuple[Path, dict[str, Any]]]
) -> ray.ObjectRef:
    """Begin to measure a model in a Ray task that holds what the evaluator does; its process ends with it, and so does vLLM."""
    from actors.evaluation.harness import WantedTask, measure_model

    evaluate, engine, source = config.evaluate, config.evaluate.benchmark_engine, _sources(models)[name]
    assert engine is not None, "there are benchmarks"
    task = ray.remote(max_calls=1)(measure_model).options(
        name=f"benchmark {Path(source.name).name}", num_cpus=evaluate.cpus, num_gpus=evaluate.gpus,
        runtime_env={"env_vars": {**engine_environment(engine), "TQDM_DISABLE": "1"}},
    )  # fmt: skip
    wanted = [WantedTask(task, str(path), identity) for task, (path, identity) in tasks.items()]
    return task.remote(source, models.tokenizer_source(), wanted, evaluate)


def _measured(name: str, reference: ray.ObjectRef) -> float:
    try:
        seconds: float = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, torch.OutOfMemoryError):
            raise ValueError(
                f"benchmark: one GPU does not hold the {name.replace('_', ' ')} and its texts ({error.cause}): "
                "evaluate.benchmarks.batch_rows=1, evaluate.precision=bfloat16, or evaluate.gpus=0, would do"
            ) from error
        raise
    return seconds


def _sources(models: Models) -> dict[str, ModelSource]:
    return dict(zip(MODEL_NAMES, (models.ready("teacher"), models.ready("student"), models.distilled()), strict=True))


@cache
def _identity(source: ModelSource, stamps: tuple[tuple[str, int, int], ...]) -> dict[str, Any]:
    """Return a model's identity; a start asks for it several times, and reading large weights takes a while."""
    return model_identity(source)


def _stamps(source: ModelSource) -> tuple[tuple[str, int, int], ...]:
    """Return name, time and size of the weights' files."""
    files = sorted(Path(source.name).glob("*.safetensors"))
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)


def _names(wanted: Wanted) -> dict[str, list[str]]:
    return {name: list(tasks) for name, tasks in wanted.items()}


def _installed_version() -> str | None:
    with suppress(PackageNotFoundError):
        return version("lm_eval")
    return None


def _settings_of(config: RunConfig) -> BenchmarksConfig:
    if config.evaluate.benchmarks is None:
        raise ValueError(
            "evaluate.benchmarks is null, so there is nothing to measure by; 'evaluate.benchmarks={tasks: [gsm8k]}' would do"
        )
    return config.evaluate.benchmarks
