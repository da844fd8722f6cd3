"""How fast the teacher service scores, beside the bare engine, beside transformers, and with one replica more.

    python -m benchmarks.scoring [--rounds 3]

A Llama-type teacher, V = 32k, real vLLM on the CPU, one thread a replica; all ratios are medians over rounds in which the
contestants take turns. The floor is the bare engine asked for the prompt's own log-probabilities alone (K = 0), nothing encoded,
nothing written; the pool's times hold everything from reading the rows to the rename of the last shard.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.config.models import EngineConfig
from actors.engines.base import TeacherEngine, TeacherSpec, engine_environment
from actors.engines.build import build_engine
from actors.examples import write_examples
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, example_key, tail_logmass
from actors.score_store.store import ScoreStore
from actors.teacher.pool import TeacherPool
from actors.teacher.replica import TeacherReplica
from benchmarks.bars import Bar, alternating_seconds, median_ratio, print_table, report

VOCAB, HIDDEN, LAYERS, TOKENS, ROWS, TOP_K = 32_000, 384, 6, 256, 32, 64
ROWS_PER_SHARD = 8
MEMORY_ROWS = (400, 4_000)
MEMORY_MIB = 8.0  # by which a driver may grow between the smaller and the larger data set


class BareEngine(TeacherReplica):
    """A replica whose engine can also be used without what is built around it."""

    def prefill(self, prompts: Sequence[list[int]]) -> None:
        """Compute the log-probabilities of the prompts' own tokens."""
        self._engine_thread.submit(self._prefill, prompts).result()

    def _prefill(self, prompts: Sequence[list[int]]) -> None:
        from vllm import SamplingParams  # in the replica's process alone

        engine: Any = self._engine
        parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0)
        engine._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)


class InstantTeacher:
    """An engine that makes scores up, so that nothing but the service itself takes time and memory."""

    vocab_size = VOCAB
    way = "made up"

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return plausible scores."""
        generator = np.random.default_rng(examples[0].row)
        return [self._scores(example, generator) for example in examples]

    def _scores(self, example: Example, generator: np.random.Generator) -> TeacherScores:
        targets = len(example.targets)
        logprobs = -np.sort(generator.uniform(6, 9, (targets, TOP_K)).astype(np.float32), axis=1)
        ids = (example.targets[:, None] + 1 + np.arange(TOP_K)) % VOCAB
        target = np.full(targets, -1.0, np.float32)
        return TeacherScores(example.key, target, ids.astype(np.int32), logprobs, tail_logmass(target, logprobs))

    def close(self) -> None:
        """Nothing to give back."""


def instant_teacher(spec: TeacherSpec) -> TeacherEngine:
    """Build the engine that makes scores up."""
    return InstantTeacher()


def every_row_teacher(spec: TeacherSpec) -> TeacherEngine:
    """Build the configured engine, and let it multiply every position of a prompt by the output head."""
    engine = build_engine(spec)
    engine.skips_prompts = False  # type: ignore[attr-defined]
    return engine


def rows_of(count: int, first_target: int, tokens: int = TOKENS) -> list[Example]:
    """Return rows of random tokens, targets from ``first_target`` on."""
    generator = np.random.default_rng(0)
    mask = np.arange(tokens) >= first_target
    rows = [generator.integers(0, VOCAB, tokens).astype(np.int32) for _ in range(count)]
    return [Example(token_ids, mask, example_key(token_ids, mask), row) for row, token_ids in enumerate(rows)]


def write_teacher(folder: Path) -> Path:
    """Write the teacher with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=TOKENS + 1, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Service:
    """Pools over one teacher, and the data they score."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.teacher = ModelSource(str(write_teacher(folder / "teacher")))
        self.examples: dict[str, list[Example]] = {"all": rows_of(ROWS, 1), "half": rows_of(ROWS, TOKENS // 2)}
        for name, examples in self.examples.items():
            write_examples(folder / f"{name}.arrow", examples)
        self.stores = 0

    def spec(self, kind: Any = "vllm", replicas: int = 1) -> TeacherSpec:
        """Return what an engine is built from."""
        engine = EngineConfig(
            kind=kind, dtype="float32", cpus=1, replicas=replicas, rows_per_call=ROWS_PER_SHARD, kv_cache_mib=64
        )
        return TeacherSpec(engine, self.teacher, TOP_K, TOKENS)

    def pool(self, spec: TeacherSpec, factory: Callable[[TeacherSpec], TeacherEngine] = build_engine) -> TeacherPool:
        """Return a pool that runs until the benchmark ends."""
        return self.stack.enter_context(TeacherPool(spec, engine_factory=factory))

    def score(self, pool: TeacherPool, name: str) -> None:
        """Score one of the data sets into a new store."""
        self.stores += 1
        count = len(self.examples[name])
        store = ScoreStore.open_or_create(
            self.folder / f"store-{self.stores}", {"top_k": TOP_K, "vocab_size": VOCAB}, count, ROWS_PER_SHARD
        )
        list(pool.score_missing(self.folder / f"{name}.arrow", store))

    def bare(self) -> Any:
        """Return a started actor around the bare engine."""
        spec = self.spec()
        actor = ray.remote(BareEngine).options(num_cpus=1, runtime_env={"env_vars": engine_environment(spec.engine)}).remote(spec)
        ray.get(actor.start.remote())
        return actor


def driver_growth_mib(service: Service, rows: int) -> float:
    """Return by how much this process grows, at most, while a pool scores ``rows`` rows of 32 tokens."""
    name = f"memory-{rows}"
    service.examples[name] = rows_of(rows, 1, tokens=32)
    write_examples(service.folder / f"{name}.arrow", service.examples[name])
    process, largest, done = psutil.Process(os.getpid()), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            largest[0] = max(largest[0], process.memory_info().rss)

    with TeacherPool(service.spec(kind="transformers"), engine_factory=instant_teacher) as pool:
        before = process.memory_info().rss
        watcher = threading.Thread(target=watch)
        watcher.start()
        service.score(pool, name)
        done.set()
        watcher.join()
    return (largest[0] - before) / 2**20


def main() -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        service = Service(Path(folder), stack)
        driver_growth_mib(service, MEMORY_ROWS[0])  # the first pool of a process loads what all share
        growth = [driver_growth_mib(service, rows) for rows in MEMORY_ROWS]
        prompts, bare = [example.token_ids.tolist() for example in service.examples["all"]], service.bare()
        one, two = service.pool(service.spec()), service.pool(service.spec(replicas=2))
        every_row = service.pool(service.spec(), every_row_teacher)
        transformers = service.pool(service.spec(kind="transformers"))
        tasks: dict[str, Callable[[], object]] = {
            "bare engine, K=0": lambda: ray.get(bare.prefill.remote(prompts)),
            "pool, K=64, written": partial(service.score, one, "all"),
            "pool, two replicas": partial(service.score, two, "all"),
            "pool around transformers": partial(service.score, transformers, "all"),
            "half of each row prompt": partial(service.score, one, "half"),
            "the same, every row computed": partial(service.score, every_row, "half"),
        }
        started = time.perf_counter()
        seconds = alternating_seconds(tasks, rounds)
    ray.shutdown()
    tokens = ROWS * TOKENS
    print(
        f"\nLlama-type, V = {VOCAB}, H = {HIDDEN}, {LAYERS} layers, float32; {ROWS} rows of {TOKENS} tokens; one thread a replica"
    )
    print(f"{rounds} rounds in {time.perf_counter() - started:.0f} s\n")
    print_table(
        ["scoring", "tokens/s", "against the bare engine"],
        [
            [name, f"{tokens / min(values):,.0f}", f"{median_ratio(seconds['bare engine, K=0'], values):.2f}"]
            for name, values in seconds.items()
        ],
    )
    print(f"\ndriver memory while scoring {MEMORY_ROWS[0]} and {MEMORY_ROWS[1]} rows: {growth[0]:+.1f} and {growth[1]:+.1f} MiB")
    pool = seconds["pool, K=64, written"]
    speeds = [
        ("pool against the bare engine", seconds["bare engine, K=0"], pool, 0.90),
        (
            "response rows alone against all rows",
            seconds["the same, every row computed"],
            seconds["half of each row prompt"],
            1.2,
        ),
        ("two replicas against one", pool, seconds["pool, two replicas"], 1.7),
        ("vLLM against transformers", seconds["pool around transformers"], pool, 1.7),
    ]
    bars = [Bar(name, median_ratio(slow, fast), wanted, at_least=True) for name, slow, fast, wanted in speeds]
    return report([*bars, Bar("driver memory, MiB more for ten times the rows", growth[1] - growth[0], MEMORY_MIB)])


if __name__ == "__main__":
    raise SystemExit(main())
