"""One model over tasks of the lm-evaluation-harness, by the harness's own model classes; each task is kept once measured."""

import logging
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from transformers import AutoTokenizer, GenerationConfig

from actors.config.benchmarks import BenchmarksConfig
from actors.config.models import EvaluateConfig
from actors.engines.vllm_arguments import engine_arguments
from actors.evaluation.answer_ends import read_answer_ends
from actors.evaluation.benchmark_figures import BenchmarkFigure, BenchmarkResult, write_result
from actors.evaluation.evaluator import load_for_evaluation
from actors.evaluation.harness_tasks import FILE_KINDS, TaskFinder
from actors.model_source import ModelSource

BOOTSTRAPS = 1000  # of standard errors that have no formula
PYTHONS_SEED, OTHERS_SEED = 0, 1234  # the harness's own, by which some tasks shuffle their rows
REMARKS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class WantedTask:
    """One task that a model is to be measured by."""

    task: str
    """Name of a task, group or tag."""
    path: str
    """File into which the result goes."""
    identity: Mapping[str, Any]
    """All that the result depends on."""


def measure_model(
    model: ModelSource, tokenizer_source: ModelSource, wanted: Sequence[WantedTask], evaluate: EvaluateConfig
) -> float:
    """Measure a model by tasks, one after the other, and write each result as it comes; return the seconds it took.

    Args:
        model: folder or hub name of a causal language model.
        tokenizer_source: of the run; beside it stands where answers end.
        wanted: the tasks, and the files into which results go.
        evaluate: type and devices; ``evaluate.benchmarks`` says how the tasks are measured.

    Raises:
        ValueError: if a task cannot be built, asks for longer answers than the model has room for, or a GPU is asked for and
            there is none.
    """
    started, benchmarks = time.perf_counter(), evaluate.benchmarks
    assert benchmarks is not None, "tasks are wanted"
    finder = TaskFinder(benchmarks)
    build = {"transformers": _transformers_model, "vllm": _vllm_model}[benchmarks.engine]
    lm = build(model, tokenizer_source, evaluate, benchmarks)
    for one in wanted:
        write_result(Path(one.path), one.identity, measure_task(lm, finder, one.task, benchmarks))
    return time.perf_counter() - started


def measure_task(lm: Any, finder: TaskFinder, name: str, benchmarks: BenchmarksConfig) -> BenchmarkResult:
    """Measure one of the harness's models by one task, group or tag.

    Raises:
        ValueError: if it cannot be built, or asks for longer answers than the model has room for.
    """
    started = time.perf_counter()
    random.seed(PYTHONS_SEED)
    np.random.seed(OTHERS_SEED)
    torch.manual_seed(OTHERS_SEED)
    with remarks_of_the_harness() as remarks:
        loaded = finder.load(name)
        for task in loaded["tasks"].values():
            if remark := settle_task(task, benchmarks):
                remarks[remark] += 1
            require_room_for_answers(task, lm.max_length, lm.max_gen_toks)
        found = evaluate(
            lm, loaded, limit=benchmarks.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False,
            apply_chat_template=benchmarks.apply_chat_template, fewshot_as_multiturn=benchmarks.apply_chat_template,
        )  # fmt: skip
    figures = [one for shown in [*loaded["groups"], *loaded["tasks"]] for one in figures_of(shown, found)]
    top = [one for one in figures if one.task == name] or [one for one in figures if one.task in loaded["tasks"]]
    return BenchmarkResult(
        task=name, figures=tuple(top), parts=tuple(one for one in figures if one not in top), harness=version("lm_eval"),
        seconds=time.perf_counter() - started, remarks=tuple(_in_words(remarks)),
    )  # fmt: skip


def settle_task(task: Any, benchmarks: BenchmarksConfig) -> str | None:
    """Give a task the shots, the seed and the longest answer that are asked for; return in words what it does not take."""
    own, remark = task.get_config("num_fewshot"), None
    if benchmarks.shots is None:
        task.set_config(key="num_fewshot", value=own or 0)
    elif own == 0 and benchmarks.shots:
        remark = f"{task.task_name} says that it has no shots, so that shots={benchmarks.shots} is left out"
    else:
        task.set_config(key="num_fewshot", value=benchmarks.shots)
    task.set_fewshot_seed(seed=benchmarks.seed)
    if benchmarks.max_new_tokens is not None and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value={"max_gen_toks": benchmarks.max_new_tokens}, update=True)
    return remark


def require_room_for_answers(task: Any, max_length: int, default: int) -> None:
    """Raise if answers as long as a task allows leave no room for its prompts; ``default`` is for tasks that do not say.

    Raises:
        ValueError: with a number that would do.
    """
    if task.get_config("output_type") != "generate_until":
        return
    longest = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", default)
    if longest >= max_length:
        raise ValueError(
            f"evaluate.benchmarks: answers to {task.task_name} may have {longest} tokens, and the model takes {max_length}, "
            f"prompt and answer together; evaluate.benchmarks.max_new_tokens={max(1, max_length // 2)} would do"
        )


def figures_of(name: str, found: Mapping[str, Any]) -> Iterator[BenchmarkFigure]:
    """Yield the figures of a task or group from what the harness found."""
    metrics = found["results"].get(name, {})
    config = found["configs"].get(name, {})
    source = config.get("dataset_path")
    for key, value in metrics.items():
        metric, comma, taken = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        stderr = metrics.get(f"{metric}_stderr,{taken}")
        yield BenchmarkFigure(
            task=name, metric=metric, filter=taken, value=float(value),
            stderr=float(stderr) if isinstance(stderr, Real) else None, shots=found["n-shot"].get(name),
            rows=int(metrics["sample_len"]), version=str(found["versions"].get(name)),
            dataset=None if source in FILE_KINDS else source, dataset_config=config.get("dataset_name"),
        )  # fmt: skip


def _transformers_model(
    model: ModelSource, tokenizer_source: ModelSource, evaluate: EvaluateConfig, benchmarks: BenchmarksConfig
) -> Any:
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_source.name, revision=tokenizer_source.revision, trust_remote_code=tokenizer_source.trust_remote_code
    )
    network = load_for_evaluation(model, evaluate)
    # A model's own generation settings may sample or penalise repetition; what is not said here must not come from there.
    ends = read_answer_ends(Path(tokenizer_source.name), tokenizer)
    network.generation_config = GenerationConfig(eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id)
    return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=benchmarks.batch_rows, max_length=benchmarks.max_length)


def _vllm_model(model: ModelSource, tokenizer_source: ModelSource, evaluate: EvaluateConfig, benchmarks: BenchmarksConfig) -> Any:
    from actors.evaluation.harness_vllm import vllm_model_class  # here, so that only who measures with vLLM needs it installed

    model.require_safetensors()
    engine = evaluate.benchmark_engine
    assert engine is not None, "benchmarks are a part of the evaluation's configuration"
    arguments = engine_arguments(engine, model) | {"skip_tokenizer_init": False}
    return vllm_model_class(engine)(
        pretrained=arguments.pop("model"), tokenizer=tokenizer_source.name, batch_size=benchmarks.batch_rows,
        max_length=benchmarks.max_length, generation_config=tokenizer_source.name, **arguments,
    )  # fmt: skip


@contextmanager
def remarks_of_the_harness() -> Iterator[Counter[str]]:
    """Yield what the harness warns of while the body runs, with how often it did."""
    remarks: Counter[str] = Counter()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: remarks.update([" ".join(record.getMessage().split())])  # type: ignore[method-assign]
    logger = logging.getLogger("lm_eval")
    logger.addHandler(handler)
    try:
        yield remarks
    finally:
        logger.removeHandler(handler)


def _in_words(remarks: Counter[str]) -> list[str]:
    """Return a line for each kind of remark; those that differ in numbers alone are one kind."""
    kinds: dict[str, tuple[str, int]] = {}
    for remark, times in remarks.items():
        kind = re.sub(r"\d+", "#", remark)
        first, before = kinds.get(kind, (remark, 0))
        kinds[kind] = (first, before + times)
    return [first if times == 1 else f"{times} × {first}" for first, times in kinds.values()][:REMARKS_SHOWN]
