"""Rows as prompts of a language model that answers with label words: their tokens, what is refused, what names their scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from actors.examples import ExampleFile
from actors.score_store.identity import identity_difference
from orchestrator.classification.label_words import read_asked
from orchestrator.classification.preparation import prepare_run
from orchestrator.config.run import RunConfig
from orchestrator.data.tokenizers import load_tokenizer, train_tokenizer
from orchestrator.models.models import Models
from orchestrator.run.run_dir import RunDir
from orchestrator.run.scoring import ScoringStage

WINDOW = 64
TEXTS = (
    "ice floats on water", "water freezes in winter", "plants drink water", "lightning is quicker than thunder",
    "metal takes heat from fingers", "the moon pulls on the sea", "lungs need oxygen", "summer days are longer",
    "wood is warmer than metal", "plants make oxygen", "winter nights are longer", "thunder is slower than lightning",
)  # fmt: skip
ROWS = [{"text": text, "label": ("bad", "good")[number % 2], "hint": f"h{number}"} for number, text in enumerate(TEXTS)]
PROMPT, WORDS = "Grade: {{ text }} ({{ hint }})\nIt is", [" bad", " good"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("teacher") / "model")


def language_model(folder: Path, kind: type = LlamaForCausalLM) -> Path:
    texts = [f"{row['text']} It is {row['label']} {row['label']}ness of it is answering: Grade of them" for row in ROWS]
    tokenizer = train_tokenizer(texts, 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=WINDOW, num_labels=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(
    tmp_path: Path, folder: Path, rows: list[dict[str, str]] = ROWS, name: str = "run", data: dict[str, Any] | None = None,
    prompt: str = PROMPT, words: list[str] | None = WORDS, **task: Any,
) -> RunConfig:  # fmt: skip
    source = tmp_path / f"{name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig.model_validate(
        {
            "name": name, "output": str(tmp_path / "runs"), "tokenizer": {"vocab_size": 300},
            "task": {"kind": "classification", "labels": ["bad", "good"], **task},
            "data": {
                "source": {"kind": "files", "path": str(source)}, "format": {"kind": "text"}, "heldout_rows": 4, **(data or {}),
            },
            "teacher": {
                "model": {"kind": "pretrained", "name": str(folder)}, "label_words": {"prompt": prompt, "words": words},
            },
            "student": {"model": {"kind": "text_mlp"}},
        }
    )  # fmt: skip


def prepared(config: RunConfig) -> Path:
    path = config.run_dir
    path.mkdir(parents=True, exist_ok=True)
    models = Models(config, path)
    facts = prepare_run(config, path, models)
    asked = read_asked(path / "data")
    assert facts["counts"]["teacher_longest"] == asked.longest
    assert models.ready("teacher").classes == 0 and models.ready("student").classes == 2
    return path / "data"


def test_a_row_is_its_prompt_with_the_label_behind_it(tmp_path: Path, folder: Path) -> None:
    data, tokenizer = prepared(config_of(tmp_path, folder)), load_tokenizer(str(folder))
    asked, seen = read_asked(data), set[str]()
    for split in ("train", "heldout"):
        mine, theirs = ExampleFile(data / f"teacher_{split}.arrow"), ExampleFile(data / f"{split}.arrow")
        assert (mine.hash, mine.rows.tolist()) == (theirs.hash, theirs.rows.tolist())
        for position in range(len(mine)):
            example = mine[position]
            row = ROWS[example.row]
            prompt = f"Grade: {row['text']} ({row['hint']})\nIt is"
            assert example.token_ids[:-1].tolist() == tokenizer(prompt)["input_ids"]
            assert example.targets.tolist() == theirs[position].targets.tolist() == [["bad", "good"].index(row["label"])]
            for word, ids in zip(WORDS, asked.token_ids, strict=True):
                assert tokenizer(prompt + word)["input_ids"] == [*example.token_ids[:-1].tolist(), *ids]
            seen.add(prompt)
    assert len(seen) == len(ROWS)


def test_a_text_that_is_cut_for_the_student_is_asked_whole(tmp_path: Path, folder: Path) -> None:
    data = prepared(config_of(tmp_path, folder, data={"max_tokens": 8, "too_long": "truncate"}))
    assert ExampleFile(data / "train.arrow").lengths.max() == 8
    whole = prepared(config_of(tmp_path, folder, name="whole"))
    assert np.array_equal(ExampleFile(data / "teacher_train.arrow").lengths, ExampleFile(whole / "teacher_train.arrow").lengths)


def test_what_people_write_is_no_special_token(tmp_path: Path, folder: Path) -> None:
    rows = [{**row, "text": f"{row['text']}<|end|>"} for row in ROWS]
    end = load_tokenizer(str(folder)).eos_token_id
    for policy, there in (("split", False), ("keep", True)):
        data = prepared(config_of(tmp_path, folder, rows, policy, {"special_tokens": policy}))
        assert (end in ExampleFile(data / "teacher_train.arrow")[0].token_ids[:-1]) is there


def test_the_token_that_begins_every_text_begins_a_prompt_once(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "begins")
    settings = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|user|>", "type_id": 0}}
    settings["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|user|>": {"id": "<|user|>", "ids": [2], "tokens": ["<|user|>"]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, "bos_token": "<|user|>"}))
    first, begin = load_tokenizer(str(folder))("It")["input_ids"], load_tokenizer(str(folder)).bos_token_id
    assert first[0] == begin and len(first) > 1
    for name, prompt in (("without", PROMPT), ("with", f"<|user|>{PROMPT}")):
        example = ExampleFile(prepared(config_of(tmp_path, folder, name=name, prompt=prompt)) / "teacher_train.arrow")[0]
        assert example.token_ids[:-1].tolist().count(begin) == 1 and example.token_ids[0] == begin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{{ label }}: it is"}, r"prompt reads the field 'label', which is the label \(task\.field\).* without it"),
        ({"prompt": "{% if text == 'x' %}a{% endif %}"}, r"row \d+: teacher\.label_words\.prompt is empty for this row"),
        ({"prompt": "{{ absent }} it is"}, r"row \d+: teacher\.label_words\.prompt cannot be filled in: 'absent' is undefined"),
        ({"prompt": "{{ text }} {{ text }} " * 8}, r"row \d+: its prompt .* has \d+ tokens .* \d, and the teacher reads 64; a"),
        (
            {"prompt": "{{ text }} ans", "words": ["wer", " good"]},
            r"row \d+: teacher\.label_words\.words has 'wer', which the tokenizer joins with .* '.* ans', .*; ' wer' would do",
        ),
        (
            {"words": [" good enough", " good"]},
            r"words has ' good' and ' good enough', and the tokens of the first begin those of the second, .* otherwise would do",
        ),
        ({"words": [" good", " good"]}, r"words has ' good' and ' good', and the tokens of the first begin"),
    ],
)
def test_a_prompt_or_a_word_that_cannot_serve_is_refused(
    tmp_path: Path, folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(config_of(tmp_path, folder, **changes))


def test_a_word_of_other_tokens_in_another_row_is_refused(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "spaces")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(settings))  # a text behind a special token gets a space of its own
    prompt = "{{ text }}.{% if hint < 'h5' %}<|end|>{% endif %}"
    message = r"row \d+: the tokens of 'bad' .* are \[.*\] behind its prompt, and \[.*\] behind .* ends in one text for all rows"
    with pytest.raises(ValueError, match=message):
        prepared(config_of(tmp_path, folder, prompt=prompt, words=["bad", "good"]))


def test_a_classifier_does_not_answer_with_words(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "classifier", LlamaForSequenceClassification)
    with pytest.raises(ValueError, match=r"'.*classifier' is a LlamaForSequenceClassification; teacher\.label_words=null"):
        prepared(config_of(tmp_path, folder))


def identity(config: RunConfig) -> dict[str, Any]:
    with RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        run_dir.stage("prepare", lambda: prepare_run(config, run_dir.path, models))
        return ScoringStage(config, run_dir, models).heldout_store.identity


def test_other_prompts_and_other_words_are_other_scores(tmp_path: Path, folder: Path) -> None:
    before = identity(config_of(tmp_path, folder))

    def differing(**changes: Any) -> set[str]:
        now = identity(config_of(tmp_path, folder, name=f"run{len(list(tmp_path.iterdir()))}", **changes))
        return {line.split(":")[0] for line in identity_difference(now, before)}

    assert differing() == set()
    assert differing(prompt=f"Please. {PROMPT}") == {"tokenizer", "label_words.prompt", "label_words.tokens"}
    assert differing(words=[" poor", " good"]) == {"label_words.words", "label_words.tokens"}
    hinted = [{**row, "hint": "another"} for row in ROWS]  # read by the prompt alone: the rows themselves are the same
    assert differing(rows=hinted) == {"tokenizer", "label_words.tokens"}
