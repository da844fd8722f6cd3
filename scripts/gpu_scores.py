"""What a teacher's scores are like on this machine: which way they take, how exact they are, which tokens they name.

    python -m scripts.gpu_scores MODEL [--engine vllm] [--dtype bfloat16] [--tensor-parallel 1] [--rows 32] [--cpu]

Rows are prose of the project's own pages. The reference is the model's plain forward pass in float32, which takes 4 bytes a
weight on the first GPU before the engine is loaded. N targets, K top-k, V vocabulary.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.config.models import EngineConfig
from actors.engines.base import TeacherEngine, TeacherSpec, engine_environment
from actors.engines.build import build_engine
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, example_key
from actors.teacher.parity import Probe
from actors.teacher.reference_pass import Reference, beginning, references
from orchestrator.data.tokenizers import ids_of, load_tokenizer

ROOT = Path(__file__).parents[1]
TOP_K, ROW_TOKENS, PROMPT_TOKENS = 64, 192, 16


@dataclass(frozen=True, slots=True)
class Spread:
    """How far the served log-probabilities of targets lie from those in float32, in nats."""

    targets: int
    mean: float
    quantile_99: float
    largest: float


@dataclass(frozen=True, slots=True)
class NamedIds:
    """Which of the named tokens no tokenizer has."""

    vocab_size: int
    """V, the width of the teacher's logits."""
    tokenizer_ids: int
    """Ids that the tokenizer has: all below this."""
    targets: int
    """N, all targets of the rows."""
    beyond: int
    """Targets of which the K most likely tokens name an id beyond them."""
    largest_mass: float
    """The most mass that such tokens have at one target."""


def prose_rows(tokenizer: PreTrainedTokenizerBase, rows: int, row_tokens: int = ROW_TOKENS) -> list[Example]:
    """Return rows of the project's pages; all but the first tokens of each are targets."""
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))
    token_ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    count = min(rows, len(token_ids) // row_tokens)
    if count == 0:
        raise ValueError(f"the pages have {len(token_ids)} tokens, and a row takes {row_tokens}")
    mask = np.arange(row_tokens) >= PROMPT_TOKENS
    cut = token_ids[: count * row_tokens].reshape(count, row_tokens)
    return [Example(one, mask, example_key(one, mask), row) for row, one in enumerate(cut)]


def spread(found: Sequence[Reference], served: Sequence[TeacherScores]) -> Spread:
    """Compare served log-probabilities of targets with the reference's, row by row.

    The reference may have only some of the rows, and of each the first targets.
    """
    errors = []
    for reference in found:
        scores, right = served[reference.example.row], reference.target_logprob[1]  # float64 [N]
        errors.append(np.abs(scores.target_logprob[: len(right)].astype(np.float64) - right))
    error = np.concatenate(errors)
    return Spread(len(error), float(error.mean()), float(np.quantile(error, 0.99)), float(error.max()))


def named_ids(served: Sequence[TeacherScores], vocab_size: int, tokenizer_ids: int) -> NamedIds:
    """Count the targets of which the K most likely tokens name one that the tokenizer has not."""
    mass = np.concatenate(
        [np.where(scores.topk_ids >= tokenizer_ids, np.exp(scores.topk_logprobs), 0.0).sum(axis=1) for scores in served]
    )  # [N]
    return NamedIds(vocab_size, tokenizer_ids, len(mass), int((mass > 0).sum()), float(mass.max()))


def lines_of(way: str, named: NamedIds, found: Spread | str) -> list[str]:
    """Return what was measured, a line each."""
    lines = [
        f"measured way: {way}",
        f"measured ids: the teacher has {named.vocab_size}, the tokenizer {named.tokenizer_ids}; {named.beyond} of "
        f"{named.targets} targets have one beyond the tokenizer's among the {TOP_K} most likely, of {named.largest_mass:.1e} of "
        "the mass at most",
    ]
    if isinstance(found, str):
        return [*lines, f"measured spread: none, since {found}"]
    return [
        *lines,
        f"measured spread: {found.targets} targets lie {found.mean:.1e} nats from float32 on average, 99 % within "
        f"{found.quantile_99:.1e}, the furthest {found.largest:.1e}",
    ]


def measure(model: ModelSource, engine: EngineConfig, rows: Sequence[Example], tokenizer_ids: int) -> list[str]:
    """Compute the reference, then load the engine and have it score the same rows; return what was measured, a line each.

    The variables of ``engine_environment`` must be in the environment.
    """
    heads = [beginning(row) for row in rows]
    device = "cuda" if engine.gpu else "cpu"
    plain = references(model, Probe(heads), device)
    served: TeacherEngine = build_engine(TeacherSpec(engine, model, TOP_K, max(len(row.token_ids) for row in rows)))
    try:
        scores = served.score(list(rows))
        named = named_ids(scores, served.vocab_size, tokenizer_ids)
        return lines_of(served.way, named, plain if isinstance(plain, str) else spread(plain.rows, scores))
    finally:
        served.close()


def main() -> int:
    """Measure one teacher and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="hub name or folder")
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cpu", action="store_true", help="serve it on CPUs")
    options = parser.parse_args()
    engine = EngineConfig(
        kind=options.engine, dtype=options.dtype, gpu=not options.cpu, tensor_parallel=options.tensor_parallel, cpus=4
    )
    os.environ.update(engine_environment(engine))
    tokenizer = load_tokenizer(options.model, None, False)
    rows = prose_rows(tokenizer, options.rows)
    for line in measure(ModelSource(options.model), engine, rows, ids_of(tokenizer)):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
