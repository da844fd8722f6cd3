"""How fast a student learns in passes of so many rows, and in passes of so many tokens: the same steps of the same rows.

    python -m benchmarks.passes [--rows 8] [--tokens 8192] [--seconds 20] [--small]

A Llama-type student of the size of Qwen2.5-0.5B, instruction rows of 20 to 500 tokens, 120 on average, in bfloat16 where there is
a GPU. Passes of few rows are short, and a GPU waits for its host between them; nothing else differs.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.config.models import TrainConfig
from actors.dataloader.sampler import StepSampler
from actors.dataloader.scored_rows import StoredRows, all_rows
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile, write_examples
from actors.monitors.gpu import GpuMonitor
from actors.records import Example, example_key
from actors.student.causal_lm import CausalStudent
from actors.student.loop import accumulate_gradients
from actors.student.model import distribute
from actors.student.optimizer import clip_gradients, make_optimizer
from actors.student.ranks import Worker
from benchmarks.bars import print_table, synchronize
from losses.config import HardLabelLoss
from losses.loss_state import LossState

ROWS, BATCH_ROWS, MEAN_TOKENS, LONGEST = 2_048, 64, 120, 500
STEPS_BEFORE = 2
"""Steps that are not timed: kernels are loaded, memory is taken."""


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama-type decoder."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


HALF_A_BILLION = Size(vocab=151_936, hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4_864)
SMALL = Size(vocab=512, hidden=32, layers=1, heads=2, kv_heads=2, intermediate=64)
"""For a look at whether all works."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One way of cutting steps into passes."""

    tokens_per_second: float
    """Tokens of rows, padding not counted."""
    mfu: float | None
    """Model FLOPs utilisation, where the GPU's speed is known."""
    gpu_memory_bytes: float | None
    """Most that tensors held."""


def instruction_lengths(rows: int, mean: float, longest: int) -> np.ndarray:
    """Return int64 [rows], lengths as instruction data has them: many short rows, few long ones."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.32, 0.8, rows)
    return np.clip(drawn, 20, longest).astype(np.int64)


def write_rows(path: Path, vocab: int, rows: int) -> ExampleFile:
    """Write rows of random tokens whose second halves are targets."""
    generator = np.random.default_rng(1)
    examples = []
    for row, length in enumerate(instruction_lengths(rows, MEAN_TOKENS, LONGEST)):
        token_ids = generator.integers(0, vocab, length).astype(np.int32)
        mask = np.arange(length) >= length // 2
        examples.append(Example(token_ids, mask, example_key(token_ids, mask), row))
    write_examples(path, examples)
    return ExampleFile(path)


def measure(size: Size, train: TrainConfig, examples: ExampleFile, gpu: bool, seconds: float) -> Speed:
    """Return the speed of optimizer steps, data to update; at least three steps are taken."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, tie_word_embeddings=True,
        )
    )  # fmt: skip
    worker, loss, state = Worker.here(torch.get_num_threads(), gpu), HardLabelLoss(kind="hard_label"), LossState()
    monitor = GpuMonitor.of(model, worker.device, train.precision)
    student = distribute(CausalStudent(model, loss), train, worker)
    optimizer = make_optimizer(student, train.optimizer)
    rows = StoredRows(examples, None, 1, StepSampler(len(examples), train.batch_rows, 0, store_order_first=True))
    weights = StepWeights(loss, 0, all_rows(examples, None, 1))
    tokens, step, started = 0, 0, time.perf_counter()
    while step < STEPS_BEFORE + 3 or time.perf_counter() - started < seconds:
        if step == STEPS_BEFORE:
            synchronize()
            tokens, started = 0, time.perf_counter()
        step += 1
        batch = rows.batch(step)
        accumulate_gradients(student, batch, weights, size.vocab, step, state, worker, train)
        clip_gradients(student, train.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batch.lengths.sum())
    synchronize()
    rate = tokens / (time.perf_counter() - started)
    half = float(examples.lengths.sum()) / 2  # of the tokens are targets
    found = monitor.numbers(examples.lengths, half, {"tokens_per_second": rate, "workers": 1})
    return Speed(rate, found.get("mfu"), found.get("gpu_memory_bytes"))


def main() -> int:
    """Measure both ways in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8, help="train.micro_batch_rows of the first way")
    parser.add_argument("--tokens", type=int, default=8_192, help="train.micro_batch_tokens of the second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each way")
    parser.add_argument("--small", action="store_true", help="a student of a few thousand weights")
    options = parser.parse_args()
    gpu, size = torch.cuda.is_available(), SMALL if options.small else HALF_A_BILLION
    ways = {"train.micro_batch_rows": options.rows, "train.micro_batch_tokens": options.tokens}
    with tempfile.TemporaryDirectory() as folder:
        examples = write_rows(Path(folder) / "rows.arrow", size.vocab, ROWS)
        found = {}
        for key, value in ways.items():
            changed = {"batch_rows": BATCH_ROWS, "precision": "bfloat16" if gpu else "float32", key.split(".")[1]: value}
            found[f"{key}={value}"] = measure(size, TrainConfig.model_validate(changed), examples, gpu, options.seconds)
    print_table(
        ["passes of", "tokens/s", "MFU", "GPU memory, GiB"],
        [[name, f"{one.tokens_per_second:,.0f}", _percent(one.mfu), _gib(one.gpu_memory_bytes)] for name, one in found.items()],
    )
    by_rows, by_tokens = found.values()
    print(f"measured tokens a second by tokens over those by rows: {by_tokens.tokens_per_second / by_rows.tokens_per_second:.2f}")
    return 0


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _gib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**30:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
