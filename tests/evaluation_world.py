"""A small world to evaluate in: two tiny models with random weights, a tokenizer, held-out rows, and a teacher's scores.

The scores come from full distributions, row by row and target by target. N targets, V vocabulary.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.config.models import EvaluateConfig
from actors.evaluation.evaluator import Evaluation, evaluate_model
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, example_key
from actors.score_store.store import ScoreStore

V = 29
EOS = 2
ROWS = 11


@dataclass(frozen=True)
class World:
    """Paths of one small world of models, rows and scores."""

    folder: Path

    def evaluate(
        self, model: str, top_k: int, store: str | None = None, texts: str = "texts.jsonl", tokenizer: str = "tokenizer",
        **settings: object,
    ) -> Evaluation:  # fmt: skip
        return evaluate_model(
            ModelSource(str(self.folder / model)), ModelSource(str(self.folder / tokenizer)),
            str(self.folder / "heldout.arrow"), str(self.folder / (store or f"scores-{top_k}")), str(self.folder / texts),
            EvaluateConfig(**{"batch_rows": 4, "generate_rows": 0, **settings}), top_k,
        )  # fmt: skip

    def examples(self) -> list[Example]:
        file = ExampleFile(self.folder / "heldout.arrow")
        return [file[position] for position in range(len(file))]


def make_world(folder: Path) -> World:
    save_model(folder / "teacher", seed=1)
    save_model(folder / "student", seed=2)
    save_tokenizer(folder / "tokenizer", eos=f"w{EOS}")
    examples = list(make_examples(np.random.default_rng(0)))
    write_examples(folder / "heldout.arrow", examples)
    texts = [{"row": one.row, "task": f"t{one.row % 2}", "prompt": "p", "response": f"w{one.row}"} for one in examples]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    for top_k in (5, V - 1):
        write_scores(folder / f"scores-{top_k}", examples, folder / "teacher", top_k)
    return World(folder)


def save_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.6, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.repetition_penalty = 1.7  # a greedy answer must not be bent by what a model brings along
    model.save_pretrained(folder)


def save_tokenizer(folder: Path, eos: str | None) -> None:
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(V)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos, unk_token="w0").save_pretrained(folder)


def make_examples(draws: np.random.Generator) -> Iterator[Example]:
    for row in range(100, 100 + ROWS):
        length = int(draws.integers(6, 20))
        mask = np.zeros(length, dtype=bool)
        mask[int(draws.integers(1, length - 1)) :] = True
        if row % 3 == 0:
            mask[1:3] = True  # an earlier stretch of targets, as in a conversation
            mask[3] = False
        ids = draws.integers(3, V, length).astype(np.int32)
        yield Example(ids, mask, example_key(ids, mask), row)


@cache
def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logprobs_at_targets(folder: Path, example: Example) -> np.ndarray:
    """float64 [N, V]: one row alone, no padding; what position t gives is the prediction of token t + 1."""
    with torch.no_grad():
        logits = load(folder)(torch.from_numpy(example.token_ids.astype(np.int64))[None]).logits[0].double().numpy()
    rows = [logits[position - 1] for position in range(len(example.token_ids)) if example.loss_mask[position]]
    return np.stack([row - row.max() - math.log(np.exp(row - row.max()).sum()) for row in rows])


def ranked_others(logprobs: np.ndarray, target: int) -> list[int]:
    return sorted((token for token in range(V) if token != target), key=lambda token: -logprobs[token])


def write_scores(path: Path, examples: list[Example], teacher: Path, top_k: int, top_mass: float | None = None) -> None:
    scores = []
    for example in examples:
        logprobs = logprobs_at_targets(teacher, example)
        others = [ranked_others(row, target) for target, row in zip(example.targets, logprobs, strict=True)]
        rest = [sum(math.exp(row[i]) for i in ranked[top_k:]) for ranked, row in zip(others, logprobs, strict=True)]
        scores.append(
            TeacherScores(
                example.key,
                np.array([row[g] for g, row in zip(example.targets, logprobs, strict=True)], dtype=np.float32),
                np.array([ranked[:top_k] for ranked in others], dtype=np.int32),
                np.array([row[ranked[:top_k]] for ranked, row in zip(others, logprobs, strict=True)], dtype=np.float32),
                np.array([math.log(mass) if mass > 0 else -math.inf for mass in rest], dtype=np.float32),
            )
        )
    identity = {"top_k": top_k, "top_mass": top_mass, "vocab_size": V}
    store = ScoreStore.open_or_create(path, identity, len(examples), rows_per_shard=4)
    for shard in range(store.shard_count):
        store.write_shard(shard, *([things[position] for position in store.positions(shard)] for things in (examples, scores)))
