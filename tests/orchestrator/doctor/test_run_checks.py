"""What the doctor finds of rows, of the ends of answers and of the student's export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from orchestrator.config.load import validate
from orchestrator.config.run import RunConfig
from orchestrator.doctor.run_checks import check_ends, check_export, check_rows
from orchestrator.models.models import Models
from orchestrator.run.run_dir import RunDir
from orchestrator.run.stages import prepare
from tests.worlds import VOCAB, tiny_llama

ENDED = "{% for m in messages %}{{ m.content }} <end> {% endfor %}"
UNENDED = "{% for m in messages %}{{ m.content }} {% endfor %}"


def words_with_an_end() -> PreTrainedTokenizerFast:
    words = {"<end>": 0, "<unk>": 1, "<": 2, "end": 3, ">": 4} | {f"w{index}": index for index in range(5, VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", pad_token="<end>")


def prepared(folder: Path, template: str = ENDED, **sections: Any) -> tuple[RunConfig, Models, dict[str, Any]]:
    """A run whose rows are prepared: chats of made-up words."""
    for seed, name in enumerate(("teacher", "student"), start=1):
        words_with_an_end().save_pretrained(tiny_llama(folder / name, seed))
    talks = [[{"role": "user", "content": f"w{row}"}, {"role": "assistant", "content": f"w{row + 1}"}] for row in range(5, 25)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    tree: dict[str, Any] = {
        "name": "seen", "output": str(folder / "runs"),
        "data": {
            "source": {"kind": "files", "path": str(folder / "rows.jsonl")}, "heldout_rows": 4,
            "format": {"kind": "chat", "template": template},
        },
        "teacher": {"model": {"kind": "pretrained", "name": str(folder / "teacher")}},
        "student": {"model": {"kind": "pretrained", "name": str(folder / "student")}},
        "scores": {"top_k": 8}, "evaluate": {"max_new_tokens": 8},
    }  # fmt: skip
    for section, said in sections.items():
        tree[section] = {**tree.get(section, {}), **said}
    config = validate(tree)
    with RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        return config, models, run_dir.stage("prepare", lambda: prepare(config, run_dir, models))


def test_rows_that_are_the_same_tokens_again(tmp_path: Path) -> None:
    config, _, _ = prepared(tmp_path)
    found = check_rows(config, config.run_dir)
    assert (found.state, found.numbers) == ("ok", "20 rows, prepared twice, are the same tokens")


def test_rows_with_special_tokens_in_them_are_told(tmp_path: Path) -> None:
    config, _, _ = prepared(tmp_path, template=ENDED)
    text = (tmp_path / "rows.jsonl").read_text().replace('"w7"', '"<end> w7"')
    (tmp_path / "rows.jsonl").write_text(text)
    found = check_rows(config, config.run_dir)
    assert found.state == "FAILED" and "train_hash" in found.numbers, "the rows of a file have changed"
    again, _, _ = prepared(tmp_path / "b", template=ENDED)
    (tmp_path / "b" / "rows.jsonl").write_text(text)
    with RunDir.open(again.model_copy(update={"name": "other"})) as run_dir:
        other = again.model_copy(update={"name": "other"})
        prepare(other, run_dir, Models(other, run_dir.path))
        assert "hold special tokens in people's text (split)" in check_rows(other, run_dir.path).numbers


def test_ends_that_can_be_learned_and_ends_that_cannot(tmp_path: Path) -> None:
    _, models, facts = prepared(tmp_path)
    assert check_ends(models, facts).line() == "ok ends: answers end at <end> (0)"
    _, models, facts = prepared(tmp_path / "b", template=UNENDED)
    found = check_ends(models, facts)
    assert found.state == "FAILED" and "20 of 20 answers end in no special token" in found.numbers
    assert "data.format.template" in found.advice


@pytest.mark.ray
def test_an_export_is_tried_with_adapters(local_ray: None, tmp_path: Path) -> None:
    config, models, _ = prepared(
        tmp_path, student={"lora": {"rank": 2, "modules": ["q_proj", "lm_head"]}}, export={"dtype": "bfloat16"},
        responses={"writer": "teacher", "max_new_tokens": 4},
    )  # fmt: skip
    found = check_export(config, models, config.run_dir)
    assert found.state == "ok" and "written in bfloat16" in found.numbers and "lm_head untied" in found.numbers
    assert not list(config.run_dir.glob("doctor-*"))


@pytest.mark.ray
def test_an_export_that_would_fail_after_training_fails_before(local_ray: None, tmp_path: Path) -> None:
    config, models, _ = prepared(tmp_path, export={"dtype": "float16"})
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5  # above the largest float16
    student.save_pretrained(tmp_path / "student")
    found = check_export(config, models, config.run_dir)
    assert found.state == "FAILED" and "written in float16 and loaded again, is not the one that was trained" in found.numbers
