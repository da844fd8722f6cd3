"""What ``plan`` says beside what is measured: store bytes, memory of students and teachers. On a CPU, in about five minutes.

    python -m benchmarks.plan [--without-vllm]

Memory of a student: bytes of all tensors at the worst moment of three steps of the student's own loop, by torch's profiler, its
weights included; and by how much the process grew, of which the smallest of all students is taken off, since libraries grow with
the first step. Memory of a teacher: by how much a process grew while it loaded and scored, less what a tiny one grows; and
the file of weights that transformers leaves mapped. Stores are written by the store's own code.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from actors.config.models import EngineConfig, LoraAdapter, ScoresConfig
from actors.config.workers import WorkersConfig
from actors.dataloader.sampler import StepSampler
from actors.dataloader.scored_rows import StoredRows
from actors.dataloader.step_loader import StepLoader
from actors.dataloader.step_weights import StepWeights
from actors.engines.base import TeacherSpec, engine_environment
from actors.engines.build import build_engine
from actors.examples import ExampleFile
from actors.lora import add_adapters
from actors.model_source import ModelSource
from actors.models import save_model, scratch_model
from actors.score_store.store import ScoreStore
from actors.student.causal_lm import CausalStudent
from actors.student.loop import accumulate_gradients
from actors.student.optimizer import clip_gradients, make_optimizer
from actors.student.ranks import Worker
from benchmarks.bars import Bar, peak_bytes, print_table, report
from benchmarks.plan_cases import STUDENTS, TEACHERS, TOP_K, Student, Teacher, made_up, model, workload_of, write_world
from losses.loss_state import LossState
from orchestrator.planning.memory import chunk_bytes, replica_memory, saved_bytes, store_bytes, training_memory
from orchestrator.planning.meta_models import adapted, plain_tokenizer
from orchestrator.planning.shapes import passes_of, shape_of

STEPS = 3
MIB = 2**20


def predicted_student(student: Student, examples: ExampleFile) -> int:
    """Return the bytes that the plan says."""
    passes = passes_of(workload_of(examples, student.vocab_size), student.train, workers=1, seed=0)
    low = student.train.precision == "bfloat16"

    def traced(checkpointing: bool) -> int:
        with torch.device("meta"):
            plain = scratch_model(student.model, plain_tokenizer(), student.vocab_size, 1024, seed=0)
        return saved_bytes(_ready(adapted(plain, student.lora), student.lora, checkpointing), passes.rows, passes.tokens, low)

    with torch.device("meta"):
        shape = shape_of(adapted(scratch_model(student.model, plain_tokenizer(), student.vocab_size, 1024, seed=0), student.lora))
    checkpointing = student.train.gradient_checkpointing
    anew = traced(False) // shape.layers if checkpointing else 0
    chunk = chunk_bytes(shape, passes.targets, student.train.precision, gpu=False)
    return training_memory(shape, passes, student.train, WorkersConfig(), traced(checkpointing), anew, chunk).total


def _ready(one: PreTrainedModel, lora: LoraAdapter | None, checkpointing: bool) -> PreTrainedModel:
    if checkpointing:
        one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora is not None:
            one.enable_input_require_grads()
    return one.train()


def run_student(student: Student, folder: Path, profiled: bool) -> int:
    """Take three steps; return the bytes of all tensors at the worst moment, or by how much the process grew."""
    examples, store = write_world(folder, student.vocab_size, student.lengths)
    torch.set_num_threads(1)
    grown = Growth() if not profiled else None
    plain = scratch_model(student.model, plain_tokenizer(), student.vocab_size, 1024, seed=0)
    learner = _ready(
        add_adapters(plain, student.lora) if student.lora else plain, student.lora, student.train.gradient_checkpointing
    )
    module, worker = CausalStudent(learner, student.loss), Worker(0, 1, torch.device("cpu"))
    optimizer = make_optimizer(module, student.train.optimizer)
    scores = store if student.loss.kind != "hard_label" else None
    weights = StepWeights(student.loss, seed=0, store=scores)
    rows = StoredRows(examples, scores, TOP_K, StepSampler(len(examples), student.train.batch_rows, 0, store_order_first=True))
    loader = StepLoader(rows, student.train, 0, 1, worker.device, student.vocab_size, STEPS)
    state = LossState.first(student.loss)

    def steps() -> None:
        for step in range(1, STEPS + 1):
            accumulate_gradients(module, loader, weights, step, state, worker, student.train)
            clip_gradients(module, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    if grown is None:
        return sum(weight.numel() * weight.element_size() for weight in module.parameters()) + peak_bytes(steps)
    steps()
    return grown.bytes()


class Growth:
    """By how much the process has grown at most since this was made, mapped files aside; looked at every few milliseconds."""

    def __init__(self) -> None:
        self._process, self._over = psutil.Process(os.getpid()), threading.Event()
        self._before = self._most = self._private()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.003):
            self._most = max(self._most, self._private())

    def _private(self) -> int:
        memory = self._process.memory_info()
        return int(memory.rss - memory.shared)

    def bytes(self) -> int:
        """Stop looking; return the growth."""
        self._over.set()
        self._thread.join()
        return self._most - self._before


def run_teacher(teacher: Teacher, folder: Path) -> int:
    """Load a teacher and score some rows; return by how much the process grew. The environment is set before vLLM is there."""
    os.environ.update(engine_environment(teacher.engine))
    torch.set_num_threads(1)
    examples, _ = write_world(folder, teacher.vocab_size, teacher.lengths, rows=teacher.engine.rows_per_call)
    save_model(scratch_model(teacher.model, plain_tokenizer(), teacher.vocab_size, 1024, 0), plain_tokenizer(), folder / "model")
    rows = [examples[row] for row in range(len(examples))]
    if teacher.engine.kind == "vllm":
        import actors.engines.vllm  # noqa: F401  # what importing takes is not the teacher's
    grown = Growth()
    engine = build_engine(TeacherSpec(teacher.engine, ModelSource(str(folder / "model")), TOP_K, int(examples.lengths.max())))
    engine.score(rows)
    mapped = teacher.engine.kind == "transformers" and teacher.engine.dtype == "float32"  # as they stand in the file
    return grown.bytes() + (sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors")) if mapped else 0)


def alone(task: Callable[..., int], case: object, *arguments: object) -> int:
    """Run in a fresh process, with a folder for its files."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(task, case, Path(folder), *arguments).result()


def measure_stores(bars: list[Bar]) -> None:
    """Write stores of several kinds, and compare their files with the plan."""
    lines = []
    for name, vocab_size, lengths, mass in (
        ("V = 800", 800, (14, 44), None), ("V = 32k", 32_000, (60, 320), None), ("V = 152k", 152_000, (60, 320), None),
        ("V = 32k, top_mass 0.99 (at most)", 32_000, (60, 320), 0.99),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            examples, store = write_world(Path(folder), vocab_size, lengths, rows=256)
            rows = [examples[row] for row in range(len(examples))]
            if mass is not None:
                identity = {"top_k": TOP_K, "vocab_size": vocab_size, "top_mass": mass}
                store = ScoreStore.open_or_create(Path(folder) / "mass", identity, len(rows), len(rows))
                generator = np.random.default_rng(0)
                store.write_shard(0, rows, [made_up(row, generator) for row in rows])
            measured = sum(path.stat().st_size for path in Path(store.place).glob("shard-*.[ar]*"))
        targets = sum(len(row.targets) for row in rows)
        said = store_bytes(ScoresConfig(top_k=TOP_K, top_mass=mass, rows_per_shard=256), vocab_size, len(rows), targets)
        lines.append([name, f"{measured / MIB:.3f}", f"{said / MIB:.3f}", f"{said / measured:.3f}"])
        if mass is None:
            bars.append(Bar(f"store, {name}, off by", abs(said / measured - 1), 0.05))
    print_table(["store of 256 rows, K = 64", "MiB", "plan", "ratio"], lines)
    print(flush=True)


def measure_students(bars: list[Bar]) -> None:
    """Compare the tensors of trainings, and the growth of their processes, with the plan."""
    lines = []
    smallest = alone(run_student, STUDENTS[0], False)
    for student in STUDENTS:
        with tempfile.TemporaryDirectory() as folder:
            examples, _ = write_world(Path(folder), student.vocab_size, student.lengths)
            said = predicted_student(student, examples)
        measured = alone(run_student, student, True)
        grown = f"{(alone(run_student, student, False) - smallest) / MIB:.0f}" if student.process else ""
        sizes = [f"{count / MIB:.1f}" for count in (measured, said)]
        lines.append([student.name, *sizes, f"{said / measured:.3f}", grown])
        bars.append(Bar(f"student, {student.name}, off by", abs(said / measured - 1), 0.15))
        print(lines[-1], flush=True)
    print_table(["a worker's tensors, at most", "MiB", "plan", "ratio", "process grew"], lines)
    print(flush=True)


def measure_teachers(bars: list[Bar], kinds: set[str]) -> None:
    """Compare the growth of processes that score with the plan."""
    lines, tiny = [], {}
    for teacher in (one for one in TEACHERS if one.engine.kind in kinds):
        kind = teacher.engine.kind
        if kind not in tiny:
            small = Teacher(
                "tiny", model(64, 1, 2), 1000, EngineConfig(kind=kind, dtype="float32", kv_cache_mib=1, rows_per_call=4)
            )
            tiny[kind] = alone(run_teacher, small)
        with tempfile.TemporaryDirectory() as folder:
            examples, _ = write_world(Path(folder), teacher.vocab_size, teacher.lengths, rows=teacher.engine.rows_per_call)
        work = workload_of(examples, teacher.vocab_size)
        with torch.device("meta"):
            shape = shape_of(scratch_model(teacher.model, plain_tokenizer(), teacher.vocab_size, 1024, seed=0))
        said = replica_memory(shape, teacher.engine, work.longest, int(work.targets.max())).total
        measured = alone(run_teacher, teacher) - tiny[kind]
        lines.append(
            [teacher.name, f"{measured / MIB:.0f}", f"{said / MIB:.0f}", f"{said / measured:.3f}", f"{tiny[kind] / MIB:.0f}"]
        )
        bars.append(Bar(f"teacher, {teacher.name}, off by", abs(said / measured - 1), 0.15))
        print(lines[-1], flush=True)
    print_table(["a replica's process grew", "MiB", "plan", "ratio", "a tiny one"], lines)


def main() -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--without-vllm", action="store_true", help="leave out the engine that takes longest to start")
    options = parser.parse_args()
    bars: list[Bar] = []
    started = time.monotonic()
    measure_stores(bars)
    measure_students(bars)
    measure_teachers(bars, {"transformers"} if options.without_vllm else {"transformers", "vllm"})
    print(f"{time.monotonic() - started:.0f} s")
    return report(bars)


if __name__ == "__main__":
    raise SystemExit(main())
