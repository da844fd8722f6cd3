"""A whole student step: ATKD from the score store beside plain cross entropy on full logits, forward to optimizer.

    python -m benchmarks.student_step [--rounds 5]

A Llama-type student; rows of 256 tokens, the second half of each a target. The baseline is the model's own loss with labels,
as an ordinary fine-tuning loop has it: logits of every position.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from actors.config.models import OptimizerConfig
from actors.dataloader.collator import collate
from actors.dataloader.scored_rows import all_rows
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile, write_examples
from actors.records import Example, TeacherScores, example_key, tail_logmass
from actors.score_store.store import ScoreStore
from actors.student.causal_lm import CausalStudent
from actors.student.optimizer import make_optimizer
from benchmarks.bars import Bar, alternating_seconds, median_ratio, print_table, report
from losses.config import AtkdLoss
from losses.distillation import LossSums
from losses.loss_state import LossState

VOCAB, HIDDEN, LAYERS, TOKENS, ROWS, TOP_K = 32_000, 256, 4, 256, 8, 64


def write_world(folder: Path) -> tuple[ExampleFile, ScoreStore]:
    """Write rows of random tokens and what a made-up teacher says of their second halves."""
    generator = np.random.default_rng(0)
    mask = np.arange(TOKENS) >= TOKENS // 2
    examples, scores = [], []
    for row in range(ROWS):
        token_ids = generator.integers(0, VOCAB, TOKENS).astype(np.int32)
        examples.append(Example(token_ids, mask, example_key(token_ids, mask), row))
        logits = 4 * generator.normal(size=(TOKENS // 2, VOCAB)).astype(np.float32)
        scores.append(scores_of(examples[-1], torch.from_numpy(logits)))
    write_examples(folder / "rows.arrow", examples)
    store = ScoreStore.open_or_create(folder / "store", {"top_k": TOP_K, "vocab_size": VOCAB}, ROWS, ROWS)
    store.write_shard(0, examples, scores)
    return ExampleFile(folder / "rows.arrow"), store


def scores_of(example: Example, logits: Tensor) -> TeacherScores:
    """Return the scores of one example, from logits [N, V] at its targets."""
    targets = torch.from_numpy(example.targets.astype(np.int64))
    logprobs = logits.log_softmax(dim=1)
    at_target = logprobs.gather(1, targets[:, None]).squeeze(1).numpy()
    topk = logprobs.scatter(1, targets[:, None], -torch.inf).topk(TOP_K, dim=1)
    values = topk.values.numpy()
    return TeacherScores(example.key, at_target, topk.indices.numpy().astype(np.int32), values, tail_logmass(at_target, values))


def make_model() -> LlamaForCausalLM:
    """Return the student, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=True,
        )  # fmt: skip
    )


def update(optimizer: Optimizer) -> None:
    """Take the step."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        examples, store = write_world(Path(folder))
        loss, state = AtkdLoss(kind="atkd"), LossState()
        batch = all_rows(examples, store, TOP_K)
        step_weights = StepWeights(loss, seed=0, store=store)
        plain, student = make_model().to(device), CausalStudent(make_model(), loss).to(device)
        plain_optimizer, optimizer = (make_optimizer(model, OptimizerConfig()) for model in (plain, student))
        token_ids = torch.from_numpy(np.stack([examples[row].token_ids for row in range(ROWS)]).astype(np.int64)).to(device)
        labels = token_ids.masked_fill(torch.arange(TOKENS, device=device) < TOKENS // 2, -100)
        reading: list[float] = []

        def cross_entropy_step() -> None:
            with precision:
                value = plain(input_ids=token_ids, labels=labels, use_cache=False).loss
            value.backward()
            update(plain_optimizer)

        def atkd_step() -> None:
            started = time.perf_counter()
            weights = step_weights.of_step(batch, [[list(range(ROWS))]], step=1, state=state)
            micro_batch = collate(batch, range(ROWS), VOCAB, weights).to(device)
            reading.append(time.perf_counter() - started)
            with precision:
                sums = LossSums(*student(micro_batch, state))
            sums.loss.backward()
            update(optimizer)

        steps: dict[str, Callable[[], object]] = {
            "cross entropy, full logits": cross_entropy_step,
            "ATKD from the store": atkd_step,
        }
        seconds = alternating_seconds(steps, rounds)
    ours, theirs = seconds["ATKD from the store"], seconds["cross entropy, full logits"]
    share = statistics.median(read / step for read, step in zip(reading[1:], ours, strict=True))
    rows = [[name, f"{min(values) * 1e3:.0f}", f"{median_ratio(values, theirs):.2f}"] for name, values in seconds.items()]
    print(f"\nLlama-type, V = {VOCAB}, H = {HIDDEN}, {LAYERS} layers; {ROWS} rows of {TOKENS} tokens, half targets; {device}\n")
    print_table(["step", "ms", "ratio"], rows)
    print(f"\nreading and collating {min(reading) * 1e3:.1f} ms a step, {share:.1%}")
    return report([Bar("ATKD step", median_ratio(ours, theirs), 1.10), Bar("reading and collating", share, 0.03)])


if __name__ == "__main__":
    raise SystemExit(main())
