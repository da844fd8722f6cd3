"""The models that answer, each in a Ray actor: a classifier on the devices of the evaluation, a language model in a sampler.

B rows, C classes.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.config.models import EngineConfig
from actors.config.workers import WorkersConfig
from actors.engines.vllm_limits import CPU_HEAD_SIZES
from actors.environment import task_environment
from actors.evaluation.answer_ends import read_answer_ends
from actors.evaluation.predictions import ClassPredictor, ClassPredictorHandle
from actors.rollouts.base import Prompt, SamplerSpec, Sampling
from actors.rollouts.workers import RolloutWorkers, Weights
from orchestrator.cluster.node_facts import installed_vllm
from orchestrator.config.run import RunConfig
from orchestrator.data.tokenizers import ids_of
from orchestrator.models.models import Models, Role, config_of, named_below, vocab_size_of
from orchestrator.predicting.options import PredictOptions
from orchestrator.predicting.questions import Question, source_of

logger = logging.getLogger("atkd")

Answer = dict[str, Any]
Answering = Callable[[Sequence[Question]], list[Answer]]
"""Answers a batch of rows, in their order: plain JSON."""
A_TRIFLE = 0.01
"""CPUs that Ray is told of an engine that stands nowhere."""


@contextmanager
def class_answers(
    config: RunConfig, models: Models, role: Role, labels: Sequence[str], temperature: float
) -> Iterator[Answering]:
    """Yield what answers rows with a label and the probability of each, logits being divided by a temperature."""
    evaluate, source = config.evaluate, source_of(models, role)
    actor: ClassPredictorHandle = ray.remote(ClassPredictor).options(
        num_cpus=evaluate.cpus, num_gpus=evaluate.gpus,
        runtime_env={"env_vars": task_environment(evaluate.cpus, evaluate.gpus > 0)},
    ).remote(source, evaluate, temperature)  # fmt: skip

    def answer(questions: Sequence[Question]) -> list[Answer]:
        probabilities: np.ndarray = ray.get(actor.predict.remote([question.token_ids for question in questions]))
        return [
            {
                "row": question.row, "label": labels[int(of_row.argmax())],
                "probabilities": {label: float(f"{share:.6g}") for label, share in zip(labels, of_row, strict=True)},
            }
            for question, of_row in zip(questions, probabilities, strict=True)
        ]  # fmt: skip

    try:
        yield answer
    finally:
        ray.kill(actor)


@contextmanager
def text_answers(
    models: Models, role: Role, engine: EngineConfig, sampling: Sampling, longest_prompt: int, logs: Path
) -> Iterator[Answering]:
    """Yield what answers prompts with text, which ends where the run's answers end."""
    source, tokenizer = source_of(models, role), models.tokenizer()
    vocab_size, ends = vocab_size_of(source), read_answer_ends(models.tokenizer_folder, tokenizer)
    bound = named_below(min(ids_of(tokenizer), vocab_size), vocab_size)
    spec = SamplerSpec(engine, source, sampling, ends, longest_prompt, bound)

    with RolloutWorkers(spec, 1, logs, name="predictor") as workers:

        def answer(questions: Sequence[Question]) -> list[Answer]:
            prompts = [Prompt(question.token_ids, question.row) for question in questions]
            responses = workers.write(Weights(0, source), prompts).responses
            return [
                {"row": question.row, "prompt": question.prompt, "response": text_of(response.token_ids.tolist())}
                for question, response in zip(questions, responses, strict=True)
            ]

        def text_of(tokens: list[int]) -> str:
            length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            return str(tokenizer.decode(tokens[:length], skip_special_tokens=True))

        yield answer


def choose_engine(config: RunConfig, models: Models, role: Role, options: PredictOptions) -> EngineConfig:
    """Return how a language model is served: on the devices of the evaluation, in its type.

    vLLM is taken where one is installed for these devices that serves the model; where it was asked for, it must be.

    Raises:
        ValueError: if it is asked for and cannot serve, naming what would do.
    """
    evaluate, served = config.evaluate, config.teacher.engine
    kind = options.engine
    if kind != "transformers":
        fault = why_no_vllm(config, models, role)
        if fault is not None and kind == "vllm":
            raise ValueError(f"--engine vllm: {fault}; --engine transformers would do")
        if fault is not None:
            logger.info(f"predict: answered by transformers, since {fault}")
        kind = "transformers" if fault is not None else "vllm"
    return EngineConfig(
        kind=kind, dtype=evaluate.precision, cpus=evaluate.cpus, gpu=evaluate.gpus > 0,
        rows_per_call=options.batch_rows or served.rows_per_call, gpu_memory_utilization=served.gpu_memory_utilization,
        kv_cache_mib=served.kv_cache_mib,
    )  # fmt: skip


def why_no_vllm(config: RunConfig, models: Models, role: Role) -> str | None:
    """Return why vLLM does not serve a model on the devices of the evaluation; None where nothing is known against it."""
    build, gpu = installed_vllm(), config.evaluate.gpus > 0
    if build is None:
        return "no vLLM is installed"
    if gpu != (build == "gpu"):
        return f"the vLLM that is installed is built for {'GPUs' if build == 'gpu' else 'CPUs'} (evaluate.gpus {int(gpu)})"
    settings = config_of(source_of(models, role)).get_text_config()
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    if not gpu and head_size not in CPU_HEAD_SIZES:
        return f"the {role} has heads of size {head_size}, for which vLLM has no kernel on CPUs"
    return None


def devices_needed(config: RunConfig, folder: Path) -> RunConfig:
    """Return a run as far as predicting asks for devices: those of the evaluation, and none for training or scoring.

    A run that was made on many GPUs can so be asked on a machine without.
    """
    engine = EngineConfig(kind="transformers", cpus=A_TRIFLE)
    sides = {
        name: side.model_copy(update={"finetune": None})
        for name, side in (("teacher", config.teacher), ("student", config.student))
    }
    place = {} if folder == config.run_dir else {"name": folder.name, "output": str(folder.parent)}
    sides["teacher"] = sides["teacher"].model_copy(update={"engine": engine})
    return config.model_copy(
        update={
            **sides, **place, "responses": None, "rollouts": None,
            "workers": WorkersConfig(cpus=A_TRIFLE), "train": config.train.model_copy(update={"compile": False}),
            "scores": config.scores.model_copy(update={"overlap": False}),
        }
    )  # fmt: skip
