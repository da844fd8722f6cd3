"""Prepared data: the files agree with each other and with the rows, and every row is counted."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from actors.examples import ExampleFile
from orchestrator.config.data import TASK_KINDS, BuiltinSource, DataConfig, FilesSource, HeldoutConfig
from orchestrator.config.formats import ChatFormat, InstructionFormat
from orchestrator.data.dataset import prepare_data
from orchestrator.data.mixture import numbered
from orchestrator.data.synthetic import make_rows
from orchestrator.data.templates import texts_to_learn
from orchestrator.data.tokenizers import tokenizer_hash, train_tokenizer

PLAIN = InstructionFormat(kind="instruction", prompt="{{ prompt }}")


@cache
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(texts_to_learn(numbered(make_rows(100, TASK_KINDS, 0)), DataConfig()), 400)


def questions(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{number}?", "response": f"{number}!"} for number in range(count)]


def prepare(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    """Prepare rows from a file with the trained tokenizer."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source=FilesSource(kind="files", path=str(path)), format=PLAIN, **settings)
    return prepare_data(data, lambda texts: trained(), folder / "data")


def test_prepared_files_agree_with_each_other_and_with_the_rows(tmp_path: Path) -> None:
    data = DataConfig(source=BuiltinSource(kind="builtin", rows=300), heldout_rows=30, seed=3)
    learned_from: list[str] = []

    def tokenizer_for(texts: list[str]) -> PreTrainedTokenizerFast:
        learned_from.extend(texts)
        return trained()

    counts = prepare_data(data, tokenizer_for, tmp_path / "deep" / "data")
    folder = tmp_path / "deep" / "data"
    train, heldout = ExampleFile(folder / "train.arrow"), ExampleFile(folder / "heldout.arrow")
    rows = make_rows(300, TASK_KINDS, 3)
    texts = [json.loads(line) for line in (folder / "heldout_texts.jsonl").read_text().splitlines()]
    assert (len(train), len(heldout), len(texts)) == (270, 30, 30)
    assert sorted([*train.rows, *heldout.rows]) == list(range(300))
    for position, text in enumerate(texts):
        example, row = heldout[position], rows[text["row"]]
        assert example.row == text["row"]
        assert (text["task"], text["response"]) == (row["task"], row["response"])
        assert trained().decode(example.token_ids) == f"{text['prompt']}{text['response']}<|end|>"
        assert trained().decode(example.targets) == f"{row['response']}<|end|>"
    assert learned_from == [trained().decode(train[position].token_ids[:-1]) for position in range(270)]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train_hash"] == train.hash
    assert summary["heldout_hash"] == heldout.hash
    assert summary["tokenizer_hash"] == tokenizer_hash(trained())
    assert summary["counts"] == vars(counts)
    assert counts.train_tokens == train.lengths.sum()
    assert counts.train_targets == sum(train[position].loss_mask.sum() for position in range(270))
    assert counts.heldout_targets == sum(heldout[position].loss_mask.sum() for position in range(30))
    assert counts.longest == max(train.lengths.max(), heldout.lengths.max())
    assert sorted(path.name for path in folder.iterdir()) == [
        "heldout.arrow",
        "heldout_texts.jsonl",
        "summary.json",
        "train.arrow",
    ]


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    data = DataConfig(source=BuiltinSource(kind="builtin", rows=60), heldout_rows=6)
    for name in ("one", "two"):
        prepare_data(data, lambda texts: trained(), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_counts_of_every_kind_are_shown(tmp_path: Path) -> None:
    rows = [{"prompt": "many words " * number, "response": "The number is 3."} for number in range(1, 31)]
    cut = DataConfig(max_tokens=60, too_long="truncate")
    counts = prepare(tmp_path, rows, heldout_rows=5, max_tokens=60, too_long="truncate")
    assert counts.rows_read == 30 == counts.train_rows + counts.heldout_rows + counts.rows_without_target
    assert counts.rows_truncated > 0 and counts.rows_without_target > 0
    assert counts.longest == 60 < counts.longest_read
    line, *_ = counts.lines(cut)
    assert f"longest 60 tokens; {counts.rows_truncated} cut as too long (the longest has {counts.longest_read} tokens)" in line
    assert f"{counts.rows_without_target} dropped without a target" in line and "dropped as too long" not in line
    counts = prepare(tmp_path, rows, heldout_rows=5, max_tokens=60)
    assert counts.rows_read == 30 == counts.train_rows + counts.heldout_rows + counts.rows_dropped_long
    line, *_ = counts.lines(DataConfig(max_tokens=60))
    assert f"30 rows read: {counts.train_rows} to train on" in line and f"longest {counts.longest} tokens" in line
    assert counts.longest <= 60 < counts.longest_read
    assert (
        f"{counts.rows_dropped_long} dropped as too long (the longest has {counts.longest_read} tokens, data.max_tokens is 60)"
        in line
    )


def test_held_out_rows_that_are_trained_on_too_are_counted(tmp_path: Path) -> None:
    counts = prepare(tmp_path, [{"prompt": "Say it: ", "response": "yes"}] * 20, heldout_rows=4)
    assert (counts.train_rows, counts.heldout_rows, counts.heldout_rows_in_train) == (16, 4, 4)
    assert "4 held out but also among the training rows" in counts.lines(DataConfig())[0]
    assert prepare(tmp_path, questions(20), heldout_rows=4).heldout_rows_in_train == 0


def test_no_row_short_enough_names_the_length_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no training row is left: 16 exceed data\.max_tokens 4, .*; data\.max_tokens=\d+ would"
    ) as caught:
        prepare(tmp_path, questions(20), heldout_rows=4, max_tokens=4)
    enough = int(str(caught.value).split("data.max_tokens=")[1].split()[0])
    assert prepare(tmp_path, questions(20), heldout_rows=4, max_tokens=enough).train_rows == 16


def test_an_error_leaves_no_summary_of_other_data(tmp_path: Path) -> None:
    prepare(tmp_path, questions(20), heldout_rows=4)
    (tmp_path / "data" / "train.arrow").unlink()
    (tmp_path / "data" / "train.arrow").mkdir()  # a place where no file can be written
    with pytest.raises(OSError):
        prepare(tmp_path, questions(20), heldout_rows=4)
    assert not (tmp_path / "data" / "summary.json").exists()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> FilesSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FilesSource(kind="files", path=str(path))


def test_held_out_rows_from_a_source_of_their_own(tmp_path: Path) -> None:
    ours, theirs = write_rows(tmp_path / "train.jsonl", questions(20)), write_rows(tmp_path / "valid.jsonl", questions(60)[15:])
    data = DataConfig(source=ours, format=PLAIN, heldout=HeldoutConfig(source=theirs))
    counts = prepare_data(data, lambda texts: trained(), tmp_path / "data")
    assert (counts.rows_read, counts.train_rows, counts.heldout_rows, counts.heldout_rows_in_train) == (65, 20, 45, 5)
    assert sorted(ExampleFile(tmp_path / "data" / "heldout.arrow").rows) == list(range(45))  # of their own source
    assert sorted(ExampleFile(tmp_path / "data" / "train.arrow").rows) == list(range(20))
    some = data.model_copy(update={"heldout": HeldoutConfig(source=theirs, max_rows=7), "max_rows": 12})
    counts = prepare_data(some, lambda texts: trained(), tmp_path / "fewer")
    assert (counts.train_rows, counts.heldout_rows) == (12, 7)


def test_two_ways_to_hold_out_rows_exclude_each_other(tmp_path: Path) -> None:
    source = {"kind": "files", "path": "valid.jsonl"}
    with pytest.raises(ValueError, match=r"heldout_rows 5 draws rows of the training source, heldout names "
        r".*data\.heldout_rows=null"):
        DataConfig.model_validate({"heldout_rows": 5, "heldout": {"source": source}})
    alone = DataConfig.model_validate({"heldout": {"source": source}})
    assert alone.heldout_rows is None and DataConfig().heldout_rows == 200
    assert DataConfig.model_validate(alone.model_dump(mode="json")) == alone
    assert (alone.planned_heldout_rows, DataConfig(heldout_rows=5).planned_heldout_rows) == (200, 5)


def test_rows_without_an_answer_are_refused_or_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*questions(20), {"prompt": "a", "response": None}, {"prompt": "b", "response": " "}]
    with pytest.raises(ValueError, match=r"row 2[01]: the response \(field 'response'\) is .*data\.without_answer=drop would"):
        prepare(tmp_path, rows, heldout_rows=4)
    counts = prepare(tmp_path, rows, heldout_rows=4, without_answer="drop")
    assert (counts.rows_read, counts.rows_without_answer, counts.train_rows + counts.heldout_rows) == (22, 2, 20)
    assert "; 2 dropped without an answer" in counts.lines(DataConfig())[0]
    with pytest.raises(ValueError, match=r"no training row is left: .*, 16 have no answer$"):
        prepare(tmp_path, [{"prompt": "a", "response": ""}] * 20, heldout_rows=4, without_answer="drop")


def test_what_templates_do_is_told(tmp_path: Path) -> None:
    turns = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}]
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": talk}] * 12)
    format = ChatFormat(kind="chat", template="{{ strftime_now('%Y') }}" + turns)
    data = DataConfig(source=source, format=format, heldout_rows=2)
    counts = prepare_data(data, lambda texts: trained(), tmp_path / "data")
    counted, dated, unended, *shown = counts.lines(data)
    assert "; 12 whose answer the chat template writes with other white space" in counted
    assert dated == "the chat template writes today's date, which is 2025-01-01 in this run (data.format.date)"
    assert unended.startswith("12 answers end in no special token, so a model does not learn from them where to stop")
    assert shown == counts.shown_rows and len(shown) == 3
    later = data.model_copy(update={"format": format.model_copy(update={"date": "2026-01-01"})})
    assert later.format != data.format
