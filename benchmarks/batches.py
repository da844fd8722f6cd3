"""Padding and speed of the student's loop, its steps cut into passes of so many rows, of so many tokens, or packed.

    python -m benchmarks.batches [--rows FILE --prompt '{{ question }}' --response answer] [--tokens N ...] [--rounds 3]

A Llama-type student with made-up scores of its rows, through the loop's own passes, losses and optimizer: two small ones on a
CPU, one of the size of Qwen2.5-0.5B in bfloat16 on a GPU. Rows are as long as those of a file; without one their lengths are
drawn, log-normal with a median of 60 tokens and a spread of 0.8, from 8 to 512, and half of each row is targets. Passes of so
many tokens, packed ones too, are as large as the largest of so many rows can be, in memory too, or have at most ``--tokens``.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actors.config.model_kinds import ScratchModel
from actors.config.models import TrainConfig
from actors.dataloader.sampler import StepSampler, layout_of
from actors.dataloader.scored_rows import StoredRows
from actors.dataloader.step_loader import StepLoader
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile, write_examples
from actors.models import scratch_model
from actors.monitors.gpu import GpuMonitor
from actors.records import Example, example_key
from actors.score_store.store import ScoreStore
from actors.student.causal_lm import CausalStudent
from actors.student.loop import accumulate_gradients
from actors.student.optimizer import clip_gradients, make_optimizer
from actors.student.ranks import Worker
from benchmarks.bars import Bar, alternating_seconds, median_ratio, print_table, report
from benchmarks.plan_cases import ATKD, TOP_K, made_up, model
from losses.loss_state import LossState
from orchestrator.config.data import DataConfig, FilesSource
from orchestrator.config.formats import InstructionFormat
from orchestrator.data.dataset import prepare_data
from orchestrator.data.tokenizers import train_tokenizer
from orchestrator.planning.meta_models import plain_tokenizer

LONGEST, SHORTEST = 512, 8
MEDIAN, SPREAD = 60.0, 0.8
BATCH_ROWS = (32, 128)
MICRO_BATCH_ROWS = 8
WANTED = 1.25


@dataclass(frozen=True)
class Student:
    """A student to measure."""

    name: str
    shape: ScratchModel
    vocab_size: int = 4096


ON_CPU = (Student("1.4 M", model(128, 4, 4)), Student("5.3 M", model(256, 5, 8)))
ON_GPU = (Student("0.5 B", model(896, 24, 14, kv_heads=2, intermediate_size=4864), 151_936),)


def drawn_lengths(count: int) -> np.ndarray:
    """Return int64 [count], how many tokens each row has."""
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN), SPREAD, count)
    return np.clip(drawn.round(), SHORTEST, LONGEST).astype(np.int64)


def rows_of(lengths: Sequence[int], firsts: Sequence[int]) -> list[Example]:
    """Return rows of random tokens, each with targets from its own first one on; no token is one that made-up scores name."""
    generator, rows = np.random.default_rng(0), []
    for row, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        token_ids, mask = generator.integers(2 * TOP_K, ON_CPU[0].vocab_size, length).astype(np.int32), np.arange(length) >= first
        rows.append(Example(token_ids, mask, example_key(token_ids, mask), row))
    return rows


def read_shapes(path: str, prompt: str, response: str, count: int, folder: Path) -> tuple[list[int], list[int]]:
    """Return the lengths of a file's rows in tokens, and where their first targets stand; as a run tokenizes them."""
    data = DataConfig(
        source=FilesSource(kind="files", path=path),
        format=InstructionFormat(kind="instruction", prompt=prompt, response=response),
        max_tokens=LONGEST, max_rows=count, heldout_rows=10,
    )  # fmt: skip
    prepare_data(data, lambda texts: train_tokenizer(texts, ON_CPU[0].vocab_size), folder)
    examples = ExampleFile(folder / "train.arrow")
    return examples.lengths.tolist(), [int(examples[row].target_positions[0]) for row in range(len(examples))]


def cuts_of(batch_rows: int, budgets: Sequence[int], gpu: bool) -> dict[str, TrainConfig]:
    """Return the ways to cut a step: passes of so many rows, and for each budget passes of so many tokens, padded and packed."""
    by_rows = TrainConfig(
        batch_rows=batch_rows, micro_batch_rows=MICRO_BATCH_ROWS, precision="bfloat16" if gpu else "float32"
    )
    cuts = {f"{MICRO_BATCH_ROWS} rows": by_rows}
    for tokens in budgets:
        by_tokens = by_rows.model_copy(update={"micro_batch_tokens": tokens})
        cuts |= {f"{tokens} tokens": by_tokens, f"{tokens} packed": by_tokens.model_copy(update={"packing": True})}
    return cuts


def padding_and_passes(examples: ExampleFile, train: TrainConfig, steps: int) -> tuple[float, float]:
    """Return the share of padding in the tokens of all passes, and the passes of a step."""
    sampler, real, padded, passes = StepSampler(len(examples), train.batch_rows, 0, True), 0, 0, 0
    for step in range(1, steps + 1):
        lengths = examples.lengths[sampler.positions(step)]
        for rows in layout_of(lengths, 1, train)[0]:
            together = int(lengths[rows].sum())
            real, passes = real + together, passes + 1
            padded += together if train.packing else len(rows) * int(lengths[rows].max())
    return 1 - real / padded, passes / steps


class Training:
    """A student that is taken through the same steps again and again."""

    def __init__(self, examples: ExampleFile, store: ScoreStore, student: Student, train: TrainConfig, steps: int) -> None:
        torch.manual_seed(0)
        self._worker = Worker.here(torch.get_num_threads(), torch.cuda.is_available())
        model = scratch_model(student.shape, plain_tokenizer(), student.vocab_size, LONGEST, seed=0).to(self._worker.device)
        self.monitor = GpuMonitor.of(model, self._worker.device, train.precision)
        self._student, self._vocab_size = CausalStudent(model.train(), ATKD), student.vocab_size
        self._optimizer, self._state = make_optimizer(self._student, train.optimizer), LossState.first(ATKD)
        self._weights = StepWeights(ATKD, seed=0, store=store)
        sampler = StepSampler(len(examples), train.batch_rows, 0, store_order_first=True)
        self._rows, self._train, self._steps = StoredRows(examples, store, TOP_K, sampler), train, steps

    def run(self) -> None:
        """Take the steps."""
        loader = StepLoader(self._rows, self._train, 0, 1, self._worker.device, self._vocab_size, self._steps)
        with loader:
            for step in range(1, self._steps + 1):
                accumulate_gradients(self._student, loader, self._weights, step, self._state, self._worker, self._train)
                clip_gradients(self._student, 1.0)
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)


def measure(
    examples: ExampleFile, store: ScoreStore, students: Sequence[Student], rounds: int, budgets: Sequence[int],
    batch_rows_of: Sequence[int],
) -> tuple[list[list[str]], list[Bar]]:  # fmt: skip
    """Return a line for each cut of each student, and the bars."""
    lines, bars = [], []
    longest, tokens = int(examples.lengths.max()), int(examples.lengths.sum())
    targets = sum(len(examples[row].targets) for row in range(len(examples)))
    for batch_rows in batch_rows_of:
        steps = max(1, len(examples) // batch_rows)
        for student in students:
            cuts = cuts_of(batch_rows, budgets or [MICRO_BATCH_ROWS * longest], torch.cuda.is_available())
            trainings = {name: Training(examples, store, student, train, steps) for name, train in cuts.items()}
            seconds = alternating_seconds({name: training.run for name, training in trainings.items()}, rounds)
            by_rows = next(iter(seconds.values()))
            for name, train in cuts.items():
                padding, passes = padding_and_passes(examples, train, steps)
                rate = tokens * (steps * batch_rows / len(examples)) / statistics.median(seconds[name])
                found = trainings[name].monitor.numbers(examples.lengths, targets, {"tokens_per_second": rate, "workers": 1})
                mfu = f"{found['mfu']:.1%}" if "mfu" in found else "-"
                gain = median_ratio(by_rows, seconds[name])
                cells = f"{passes:.1f}", f"{padding:.1%}", f"{rate:,.0f}", f"{gain:.2f}"
                lines.append([student.name, str(batch_rows), name, *cells, mfu])
                if train.micro_batch_tokens is not None:
                    what = f"tokens/s of {name} over by rows, {student.name}, {batch_rows} rows a step"
                    bars.append(Bar(what, gain, WANTED, at_least=True))
    return lines, bars


def main() -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", help="a file of rows, JSON Lines or another kind that data.source.path takes")
    parser.add_argument("--prompt", default="{{ prompt }}\n", help="Jinja template over a row's fields")
    parser.add_argument("--response", default="completion", help="name of the field with the response")
    parser.add_argument("--count", type=int, default=256, help="rows to take steps on")
    parser.add_argument("--tokens", type=int, nargs="+", default=(), help="of a pass; as many as the largest of so many rows")
    parser.add_argument("--batch-rows", type=int, nargs="+", default=BATCH_ROWS, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.rows:
            texts = (arguments.rows, arguments.prompt, arguments.response)
            lengths, firsts = read_shapes(*texts, count=max(2000, arguments.count), folder=Path(folder) / "data")
            lengths, firsts = lengths[: arguments.count], firsts[: arguments.count]
        else:
            lengths = drawn_lengths(arguments.count).tolist()
            firsts = [length // 2 for length in lengths]
        examples = rows_of(lengths, firsts)
        write_examples(Path(folder) / "rows.arrow", examples)
        store = ScoreStore.open_or_create(
            Path(folder) / "store", {"top_k": TOP_K, "vocab_size": ON_CPU[0].vocab_size}, len(examples), len(examples)
        )
        generator = np.random.default_rng(0)
        store.write_shard(0, examples, [made_up(example, generator) for example in examples])
        students = ON_GPU if torch.cuda.is_available() else ON_CPU
        written = ExampleFile(Path(folder) / "rows.arrow")
        lines, bars = measure(written, store, students, arguments.rounds, arguments.tokens, arguments.batch_rows)
    quartiles = " ".join(f"{value:.0f}" for value in np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
    print(f"\n{len(lengths)} rows; tokens of a row, least, quartiles, most: {quartiles}\n")
    print_table(["student", "rows a step", "a pass", "passes a step", "padding", "tokens/s", "ratio", "MFU"], lines)
    return report(bars)


if __name__ == "__main__":
    raise SystemExit(main())
