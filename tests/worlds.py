"""Small worlds for tests: models of a few thousand weights, rows of random tokens, and what a random teacher says of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.examples import write_examples
from actors.records import Example, TeacherScores, example_key, tail_logmass
from actors.score_store.store import ScoreStore

VOCAB = 96
LONGEST = 24


def word_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A tokenizer of ``vocab_size`` made-up words; 0 is the end of a sequence."""
    words = {f"w{index}": index for index in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w0", pad_token="w0", unk_token="w1"
    )


def tiny_llama(folder: Path, seed: int, hidden_size: int = 16, layers: int = 1, tied: bool = True) -> Path:
    """Write a Llama folder with random float32 weights, tokenizer included."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def random_examples(rows: int, seed: int, longest: int = LONGEST) -> list[Example]:
    """Rows of different lengths: some tokens of prompt, then at least one target."""
    generator = np.random.default_rng(seed)
    examples = []
    for row in range(rows):
        length = int(generator.integers(4, longest + 1))
        token_ids = generator.integers(0, VOCAB, length).astype(np.int32)
        loss_mask = np.arange(length) >= generator.integers(1, length)
        examples.append(Example(token_ids, loss_mask, example_key(token_ids, loss_mask), row))
    return examples


def heldout_texts(responses: Sequence[str], tasks: Sequence[str | None] = (None,)) -> str:
    """The lines of held-out rows as text, with these responses, and of these kinds of tasks in turn."""
    rows = [
        {"row": row, "task": tasks[row % len(tasks)], "prompt": "?", "response": response}
        for row, response in enumerate(responses)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def scores_from_logits(example: Example, logits: np.ndarray, top_k: int) -> TeacherScores:
    """What a teacher with these logits [T, V] says of an example; written plainly, position by position."""
    target_logprob, ids, logprobs = [], [], []
    for position in example.target_positions:
        row = logits[position - 1].astype(np.float64)
        distribution = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        target = int(example.token_ids[position])
        others = [token for token in np.argsort(-distribution, kind="stable") if token != target][:top_k]
        target_logprob.append(distribution[target])
        ids.append(others)
        logprobs.append(distribution[others])
    target_array, logprob_array = np.array(target_logprob, np.float32), np.array(logprobs, np.float32)
    return TeacherScores(
        example.key, target_array, np.array(ids, np.int32), logprob_array, tail_logmass(target_array, logprob_array)
    )


def scored_world(
    folder: Path, rows: int, top_k: int = 8, rows_per_shard: int = 8, seed: int = 0, top_mass: float | None = None
) -> tuple[Path, ScoreStore]:
    """Write rows and a complete store of a random teacher's scores; return the example file and the store."""
    examples = random_examples(rows, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_examples(folder / "train.arrow", examples)
    identity = {"top_k": top_k, "top_mass": top_mass, "vocab_size": VOCAB, "teacher": f"random {seed}"}
    store = ScoreStore.open_or_create(folder / "store", identity, rows, rows_per_shard)
    generator = np.random.default_rng(seed + 1)
    for shard in store.missing_shards():
        mine = [examples[position] for position in store.positions(shard)]
        logits = [3 * generator.normal(size=(len(example.token_ids), VOCAB)) for example in mine]
        store.write_shard(shard, mine, [scores_from_logits(*both, top_k) for both in zip(mine, logits, strict=True)])
    return folder / "train.arrow", store
