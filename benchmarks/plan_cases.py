"""What ``benchmarks.plan`` measures: trainings and teachers of several shapes, with rows and scores made up for them."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from actors.config.model_kinds import ScratchModel
from actors.config.models import EngineConfig, LoraAdapter, TrainConfig
from actors.examples import ExampleFile, write_examples
from actors.records import Example, TeacherScores, example_key, tail_logmass
from actors.score_store.store import ScoreStore
from losses.config import AtkdLoss, HardLabelLoss, LossConfig
from orchestrator.planning.shapes import Workload

TOP_K, ROWS = 64, 96
ATKD, HARD = AtkdLoss(kind="atkd"), HardLabelLoss(kind="hard_label")


@dataclass(frozen=True)
class Student:
    """A training to measure."""

    name: str
    model: ScratchModel
    vocab_size: int
    lengths: tuple[int, int]
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_rows=32, micro_batch_rows=16))
    loss: LossConfig = ATKD
    lora: LoraAdapter | None = None
    process: bool = False
    """Whether the growth of its whole process is measured too."""


@dataclass(frozen=True)
class Teacher:
    """A replica to measure."""

    name: str
    model: ScratchModel
    vocab_size: int
    engine: EngineConfig
    lengths: tuple[int, int] = (100, 250)


def model(hidden_size: int, layers: int, heads: int, **fields: object) -> ScratchModel:
    """Return a shape."""
    return ScratchModel.model_validate(
        {"kind": "scratch", "hidden_size": hidden_size, "layers": layers, "heads": heads, **fields}
    )


def cut(batch_rows: int = 32, micro_batch_rows: int = 16, **fields: object) -> TrainConfig:
    """Return how a training is cut."""
    return TrainConfig.model_validate({"batch_rows": batch_rows, "micro_batch_rows": micro_batch_rows, **fields})


SMALL, MIDDLE, WIDE, LARGE = model(64, 3, 2), model(128, 4, 4), model(256, 2, 4), model(512, 8, 8, intermediate_size=2048)
STUDENTS = (
    Student("tiny_cpu, student", SMALL, 800, (14, 44)),
    Student("tiny_cpu, teacher's fine-tuning", model(128, 5, 4), 800, (14, 44), loss=HARD),
    Student("gsm8k_cpu, student", MIDDLE, 4096, (60, 320)),
    Student("gsm8k_cpu, teacher's fine-tuning", model(256, 5, 8), 4096, (60, 320), loss=HARD, process=True),
    Student("gsm8k_cpu, student, checkpointing", MIDDLE, 4096, (60, 320), cut(gradient_checkpointing=True)),
    Student("gsm8k_cpu, student, bfloat16", MIDDLE, 4096, (60, 320), cut(precision="bfloat16")),
    Student(
        "gsm8k_cpu, student, bfloat16, checkpointing",
        MIDDLE,
        4096,
        (60, 320),
        cut(precision="bfloat16", gradient_checkpointing=True),
    ),
    Student("gsm8k_cpu, student, LoRA", MIDDLE, 4096, (60, 320), lora=LoraAdapter()),
    Student("V = 32k, short rows", WIDE, 32_000, (8, 24), cut(8, 8)),
    Student("V = 32k, short rows, accumulating", WIDE, 32_000, (8, 24), cut(8, 4)),
    Student("V = 32k, short rows, untied", model(256, 2, 4, tie_embeddings=False), 32_000, (8, 24), cut(8, 8)),
    Student("33 M weights, short rows", LARGE, 2000, (8, 24), cut(8, 4), process=True),
    Student(
        "33 M weights, LoRA, checkpointing", LARGE, 2000, (100, 256), cut(8, 4, gradient_checkpointing=True), lora=LoraAdapter()
    ),
)  # fmt: skip
PLAIN, VLLM = EngineConfig(kind="transformers", dtype="float32"), EngineConfig(dtype="float32")
TEACHERS = (
    Teacher("transformers, V = 32k", model(512, 8, 8), 32_000, PLAIN),
    Teacher("transformers, bfloat16, V = 32k", model(512, 8, 8), 32_000, EngineConfig(kind="transformers", dtype="bfloat16")),
    Teacher("vLLM, V = 32k, H = 1024", model(1024, 8, 16), 32_000, VLLM),
    Teacher("vLLM, V = 152k", model(512, 4, 8), 152_000, EngineConfig(dtype="float32", rows_per_call=32)),
)


def write_world(folder: Path, vocab_size: int, lengths: tuple[int, int], rows: int = ROWS) -> tuple[ExampleFile, ScoreStore]:
    """Write rows of random tokens, the second half of each targets, and made-up scores of them."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    examples, scores = [], []
    for row, length in enumerate(generator.integers(*lengths, rows)):
        token_ids = generator.integers(2 * TOP_K, vocab_size, length).astype(np.int32)
        mask = np.arange(length) >= length // 2
        examples.append(Example(token_ids, mask, example_key(token_ids, mask), row))
        scores.append(made_up(examples[-1], generator))
    write_examples(folder / "rows.arrow", examples)
    store = ScoreStore.open_or_create(folder / "store", {"top_k": TOP_K, "vocab_size": vocab_size}, rows, rows)
    store.write_shard(0, examples, scores)
    return ExampleFile(folder / "rows.arrow"), store


def made_up(example: Example, generator: np.random.Generator) -> TeacherScores:
    """Return scores of tokens that are never targets here."""
    targets = len(example.targets)
    ids = generator.permuted(np.tile(np.arange(2 * TOP_K), (targets, 1)), axis=1)[:, :TOP_K].astype(np.int32)
    masses = np.sort(generator.dirichlet(np.full(TOP_K + 2, 0.2), targets), axis=1)[:, ::-1]
    logprobs = np.log(masses + 1e-9).astype(np.float32)
    at_target, topk = logprobs[:, -1], np.ascontiguousarray(logprobs[:, :TOP_K])
    return TeacherScores(example.key, at_target, ids, topk, tail_logmass(at_target, topk))


def workload_of(examples: ExampleFile, vocab_size: int) -> Workload:
    """Return what a plan knows of these rows."""
    targets = examples.target_counts
    return Workload(examples.lengths, targets, 0, 0, int(examples.lengths.max()), vocab_size, "made up")
