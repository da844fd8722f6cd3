"""Two small tasks in the harness's form over the words of the evaluation's world, and what they come to, computed slowly.

``pick`` chooses among answers by their log-probability, ``say`` compares a greedy answer. V vocabulary, T tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.evaluation.answer_ends import AnswerEnds, write_answer_ends
from tests.evaluation_world import EOS, V, load

ROWS = 12
LONGEST = 4
END = "<end>"

PICK = """
task: pick
dataset_path: json
dataset_kwargs: {data_files: {train: ../rows/pick_train.jsonl, test: ../rows/pick.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
doc_to_text: "{{question}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.5}
"""

SAY = """
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: ../rows/say.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["#"], max_gen_toks: 4, do_sample: false}
filter_list:
  - {name: trimmed, filter: [{function: remove_whitespace}, {function: take_first}]}  # vLLM keeps the space before a first word
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""


def save_words(folder: Path) -> None:
    """Write a tokenizer of the world's words, and where answers end: at none of these, since the harness cuts at its text."""
    words = Tokenizer(WordLevel({END if index == EOS else f"w{index}": index for index in range(V)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(folder)
    write_answer_ends(AnswerEnds((EOS,), ()), tokenizer, folder)


def save_served(folder: Path, seed: int) -> None:
    """Write a model of the world's words with attention heads as large as vLLM's kernels for CPUs need them."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)


def make_tasks(folder: Path, answering: Path) -> Path:
    """Write both tasks and their rows; of ``say`` every other answer is the greedy one of the model ``answering``."""
    tasks, rows = folder / "tasks", folder / "rows"
    tasks.mkdir(parents=True)
    rows.mkdir()
    draws = np.random.default_rng(5)
    write_rows(rows / "pick_train.jsonl", pick_rows(draws, 3))
    write_rows(rows / "pick.jsonl", pick_rows(draws, ROWS))
    questions = [words(draws, 5) for _ in range(ROWS)]
    answers = [greedy(answering, one) if index % 2 else "w3" for index, one in enumerate(questions)]
    write_rows(rows / "say.jsonl", [{"question": one, "answer": said} for one, said in zip(questions, answers, strict=True)])
    (tasks / "pick.yaml").write_text(PICK)
    (tasks / "say.yaml").write_text(SAY)
    return tasks


def pick_rows(draws: np.random.Generator, count: int) -> list[dict[str, object]]:
    choices = [[words(draws, int(draws.integers(1, 4))) for _ in range(3)] for _ in range(count)]
    return [{"question": words(draws, 4), "choices": one, "gold": int(draws.integers(0, 3))} for one in choices]


def words(draws: np.random.Generator, count: int) -> str:
    return " ".join(f"w{token}" for token in draws.integers(3, V, count))


def write_rows(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(tasks: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tasks.parent / "rows" / f"{name}.jsonl").read_text().splitlines()]


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def logprobs(model: Path, tokens: list[int]) -> torch.Tensor:
    """float64 [T, V]: one text alone."""
    with torch.no_grad():
        return load(model)(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)


def greedy(model: Path, question: str) -> str:
    said: list[int] = []
    while len(said) < LONGEST:
        said.append(int(logprobs(model, [*ids(question), *said])[-1].argmax()))
        if said[-1] == EOS:
            return " ".join(f"w{token}" for token in said[:-1])
    return " ".join(f"w{token}" for token in said)


def picked_rightly(tasks: Path, model: Path, shots: int = 0) -> list[bool]:
    """Whether each row's right answer is the likeliest, after as many of the training rows as are asked for."""
    before = rows_of(tasks, "pick_train")[:shots]
    prompt = [token for row in before for token in ids(f"{row['question']} {row['choices'][row['gold']]}")]
    right = []
    for row in rows_of(tasks, "pick"):
        context = [*prompt, *ids(row["question"])]
        sums = []
        for choice in row["choices"]:
            found = logprobs(model, [*context, *ids(choice)])
            sums.append(sum(float(found[len(context) + i - 1, token]) for i, token in enumerate(ids(choice))))
        right.append(int(np.argmax(sums)) == row["gold"])
    return right


def said_rightly(tasks: Path, model: Path) -> list[bool]:
    return [greedy(model, row["question"]) == row["answer"] for row in rows_of(tasks, "say")]


def standard_error(right: Sequence[bool]) -> float:
    """Of a share: the sample's standard deviation by the root of the number of rows."""
    mean = sum(right) / len(right)
    return (sum((one - mean) ** 2 for one in right) / (len(right) - 1) / len(right)) ** 0.5
