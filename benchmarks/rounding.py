"""What is left of a few optimizer steps once weights are stored in 16 bits, rounded to the nearest or stochastically.

    python -m benchmarks.rounding MODEL [--rows train.jsonl --prompt '{{ question }}' --response answer]

MODEL, a folder in bfloat16, is fine-tuned with float32 weights. After some steps its log-probabilities on a few rows are compared
with those of the same weights in 16 bits, computed in float32, so that what differs is the weights alone.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.model_source import ModelSource
from actors.models import load_model
from actors.records import Example
from actors.rounding import generator_of, rounded
from benchmarks.bars import Bar, print_table, report
from benchmarks.parity import read_rows

BATCH_ROWS, COMPARED_ROWS, SEED = 16, 6, 1
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bfloat16, nearest": lambda weight: weight.to(BFLOAT16).float(),
    "bfloat16, stochastic": lambda weight: rounded(weight, BFLOAT16, generator_of(SEED)).float(),
    "float16, nearest": lambda weight: weight.to(FLOAT16).float(),
    "float16, stochastic": lambda weight: rounded(weight, FLOAT16, generator_of(SEED)).float(),
}


@torch.no_grad()
def token_logprobs(model: PreTrainedModel, rows: Sequence[Example]) -> np.ndarray:
    """Return the log-probabilities of all tokens of some rows but the first of each."""
    found = []
    for row in rows:
        token_ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        logprobs = model(input_ids=token_ids, use_cache=False).logits[0, :-1].double().log_softmax(dim=-1)
        found.append(logprobs.gather(1, token_ids[0, 1:, None])[:, 0].numpy())
    return np.concatenate(found)


def mean_loss(model: PreTrainedModel, rows: Sequence[Example]) -> torch.Tensor:
    """Return the mean over rows of the cross entropy at their targets."""
    losses = []
    for row in rows:
        token_ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        labels = token_ids.masked_fill(~torch.from_numpy(row.loss_mask.astype(bool))[None], -100)
        losses.append(model(input_ids=token_ids, labels=labels, use_cache=False).loss)
    return torch.stack(losses).mean()


def main() -> int:
    """Measure, print and compare with the bar."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", help="a file of rows; the built-in tasks where it is left out")
    parser.add_argument("--prompt", default="{{ prompt }}", help="Jinja template over a row's fields")
    parser.add_argument("--response", default="completion", help="name of the field with the response")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 4, 8], help="after which of them is compared")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.set_defaults(targets=10**9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(arguments.model, arguments, Path(folder))
    compared, learned = rows[:COMPARED_ROWS], rows[COMPARED_ROWS:]
    model = load_model(ModelSource(str(arguments.model)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    begun, lines, ratios = token_logprobs(model, compared), [], []
    for step in range(1, max(arguments.steps) + 1):
        batch = [learned[(step * BATCH_ROWS + place) % len(learned)] for place in range(BATCH_ROWS)]
        optimizer.zero_grad()
        mean_loss(model, batch).backward()
        optimizer.step()
        if step not in arguments.steps:
            continue
        trained = token_logprobs(model, compared)
        errors = {}
        for name, way in WAYS.items():
            stored = copy.deepcopy(model)
            for weight in stored.parameters():
                weight.data = way(weight.data)
            errors[name] = np.abs(token_logprobs(stored, compared) - trained)
        moved = float(np.abs(trained - begun).mean())
        cells = [f"{error.mean():.3f} ({error.max():.2f})" for error in errors.values()]
        lines.append([str(step), f"{moved:.3f}", *cells])
        ratios.append(float(errors["bfloat16, stochastic"].mean() / errors["bfloat16, nearest"].mean()))
    print(f"\nnats between the log-probabilities of {len(begun)} tokens, mean and largest\n")
    print_table(["step", "moved since the beginning", *WAYS], lines)
    return report([Bar("stochastic over nearest, bfloat16, median", statistics.median(ratios), 0.5)])


if __name__ == "__main__":
    raise SystemExit(main())
