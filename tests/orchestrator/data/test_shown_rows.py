"""What the log shows of rows of several sources, each in a format of its own, and what it says of the shares."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.examples import ExampleFile
from actors.records import Example
from orchestrator.config.data import DataConfig
from orchestrator.data import dataset
from orchestrator.data.dataset import prepare_data
from orchestrator.data.shown_rows import with_marked_targets
from tests.orchestrator.data.test_chat_templates import CHATML, tokenizer

END = "<|im_end|>"


def source(folder: Path, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "files", "path": str(path)}


def three_kinds(folder: Path, **changed: Any) -> DataConfig:
    chats = [{"messages": [{"role": "user", "content": f"chat {n}"}, {"role": "assistant", "content": "yes"}]} for n in range(6)]
    columns = [{"instruction": f"column {n}", "input": "", "output": "no"} for n in range(6)]
    plain = [{"prompt": f"plain {n}: ", "answer": "so"} for n in range(6)]
    return DataConfig.model_validate(
        {
            "sources": [
                {"source": source(folder, "chats", chats)},
                {"source": source(folder, "columns", columns), "format": {"kind": "alpaca", "template": CHATML}},
                {
                    "source": source(folder, "plain", plain),
                    "format": {"kind": "instruction", "prompt": "{{ prompt }}", "response": "answer"},
                },
            ],
            "format": {"kind": "chat", "template": CHATML}, "heldout_rows": 3,
        }
        | changed
    )  # fmt: skip


def test_the_first_row_of_each_source_is_shown_as_the_models_see_it(tmp_path: Path) -> None:
    data = three_kinds(tmp_path)
    counts = prepare_data(data, lambda texts: tokenizer(END), tmp_path / "data")
    assert "rows of data.sources.0: 6, data.sources.1: 6, data.sources.2: 6" in counts.lines(data)
    shown = "\n".join(counts.lines(data))
    assert len(counts.shown_rows) == 3
    assert "<|im_start|>user\nchat " in shown and "<|im_start|>assistant\n⟦yes<|im_end|>⟧" in shown
    assert "<|im_start|>user\ncolumn " in shown and "<|im_start|>assistant\n⟦no<|im_end|>⟧" in shown
    assert "plain " in shown and ": ⟦so<|im_end|>⟧" in shown
    assert {text.split(",")[0].split(" of ")[1] for text in counts.shown_rows} == set(data.training_sources)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_the_same_rows_are_shown_however_many_are_looked_at_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    for sources in (three_kinds(tmp_path).sources, three_kinds(tmp_path).sources[:1]):  # type: ignore[index]
        data = three_kinds(tmp_path).model_copy(update={"sources": sources})
        together = prepare_data(data, lambda texts: tokenizer(END), tmp_path / "together")
        with monkeypatch.context() as changed:
            changed.setattr(dataset, "ROWS_AT_ONCE", at_once)
            assert prepare_data(data, lambda texts: tokenizer(END), tmp_path / "apart") == together
        assert len(together.shown_rows) == 3


def test_rows_of_all_formats_are_the_tokens_of_their_own(tmp_path: Path) -> None:
    data = three_kinds(tmp_path)
    prepare_data(data, lambda texts: tokenizer(END), tmp_path / "all")
    train = ExampleFile(tmp_path / "all" / "train.arrow")
    texts = {tokenizer(END).decode(train[position].token_ids) for position in range(len(train))}
    assert sum(text.startswith("<|im_start|>user\nchat ") for text in texts) + sum(
        text.startswith("<|im_start|>user\ncolumn ") for text in texts
    ) + sum(text.startswith("plain ") for text in texts) == 15


def test_a_row_that_lacks_a_column_is_named_by_its_source_and_the_key_of_its_format(tmp_path: Path) -> None:
    data = three_kinds(tmp_path)
    assert data.sources is not None
    bad = source(tmp_path, "bad", [{"instruction": "a", "answer": "b"}])
    other = data.sources[1].model_copy(update={"source": DataConfig.model_validate({"source": bad}).source})
    mixed = data.model_copy(update={"sources": (data.sources[0], other)})
    said = r"row 0 of data\.sources\.1: has no field 'output', which data\.sources\.1\.format\.output names; its fields"
    with pytest.raises(ValueError, match=said):
        prepare_data(mixed, lambda texts: tokenizer(END), tmp_path / "data")


def test_held_out_rows_may_have_a_format_of_their_own(tmp_path: Path) -> None:
    heldout = {
        "source": source(tmp_path, "held", [{"q": "a ", "a": "b"}] * 2),
        "format": {"kind": "instruction", "prompt": "{{ q }}", "response": "a"},
    }
    data = three_kinds(tmp_path, heldout=heldout, heldout_rows=None)
    prepare_data(data, lambda texts: tokenizer(END), tmp_path / "data")
    assert tokenizer(END).decode(ExampleFile(tmp_path / "data" / "heldout.arrow")[0].token_ids) == "a b<|im_end|>"


def test_long_stretches_are_shown_without_their_middle() -> None:
    ids = tokenizer(END)("x" * 1000 + "yz", add_special_tokens=False)["input_ids"]
    mask = np.array([False] * 1000 + [True] * 2)
    shown = with_marked_targets(Example(np.array(ids, dtype=np.int32), mask, "key", 0), tokenizer(END))
    assert shown == f"{'x' * 300} [... 600 characters ...] {'x' * 100}⟦yz⟧"
