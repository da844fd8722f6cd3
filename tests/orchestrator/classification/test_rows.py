"""From rows to features and labels: what is written, and what a user is told of a row that will not do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from actors.examples import ExampleFile
from actors.records import Example
from orchestrator.classification.rows import ClassCounts, Tokenizers, prepare_classes
from orchestrator.config.data import DataConfig
from orchestrator.config.task import ClassificationTask

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "[", "]", "SEP")
GROUPED = {"group": "topic"}


def words(sides: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of words; with ``sides`` it puts [CLS] and [SEP] around a text, as a BERT's does."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if sides:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def texts(count: int = 10, **fields: Any) -> list[dict[str, Any]]:
    return [{"text": "good film" if row % 2 else "bad film", "label": row % 2, **fields} for row in range(count)]


def images(*others: Any) -> list[dict[str, Any]]:
    pixels = [[[row, 1, 2], [3, 4, 5]] for row in range(10)]
    return [{"image": image, "label": row % 2} for row, image in enumerate([*pixels, *others])]


def prepared(
    folder: Path, rows: list[dict[str, Any]], heldout: list[dict[str, Any]] | None = None, task: dict[str, Any] | None = None,
    tokenizers: Tokenizers | None = None, **data: Any,
) -> ClassCounts:  # fmt: skip
    """Write rows to a file and prepare them; ``heldout`` of its own, or the rows again."""
    sources = {}
    for name, content in (("train", rows), ("heldout", rows if heldout is None else heldout)):
        sources[name] = {"kind": "files", "path": str(folder / f"{name}.jsonl")}
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    image = "image" in rows[0]
    config = {
        "source": sources["train"], "heldout": {"source": sources["heldout"]},
        "format": {"kind": "image"} if image else {"kind": "text"}, "max_tokens": 16, **data,
    }  # fmt: skip
    settings = {"kind": "classification", "labels": [0, 1], **(task or {})}
    return prepare_classes(
        DataConfig.model_validate(config),
        ClassificationTask.model_validate(settings),
        lambda _: tokenizers or (words(False), None),
        folder / "data",
    )


def written(folder: Path, name: str) -> dict[int, Example]:
    """Return the rows of a file by their numbers."""
    file = ExampleFile(folder / "data" / f"{name}.arrow")
    return {file[place].row: file[place] for place in range(len(file))}


def test_a_row_is_its_features_and_behind_them_its_label(tmp_path: Path) -> None:
    counts = prepared(tmp_path, texts(), task={"labels": ["0", "1"]})  # the rows have the numbers 0 and 1
    for row, example in written(tmp_path, "train").items():
        assert example.token_ids.tolist() == [4 if row % 2 else 5, 6, row % 2]
        assert example.loss_mask.tolist() == [False, False, True] and example.targets.tolist() == [row % 2]
    assert counts.train_labels == {"0": 5, "1": 5} and counts.longest == counts.teacher_longest == 3
    line = "10 rows to train on, 10 held out, longest 2 tokens; 10 held out but also among the training rows"
    assert counts.lines(DataConfig())[0] == line
    assert counts.shown_rows[0].endswith(("labelled 0: bad film", "labelled 1: good film"))


def test_text_labels_and_numbers_are_told_apart_by_their_text_alone(tmp_path: Path) -> None:
    rows = [{**row, "label": str(row["label"])} for row in texts()]
    assert prepared(tmp_path, rows).train_labels == {"0": 5, "1": 5}


def test_teacher_and_student_read_a_row_as_other_tokens_under_one_key(tmp_path: Path) -> None:
    counts = prepared(tmp_path, texts(), tokenizers=(words(False), words(True)))
    own, others = written(tmp_path, "train"), written(tmp_path, "teacher_train")
    assert own.keys() == others.keys() and (counts.longest, counts.teacher_longest) == (3, 5)
    for row in own:
        assert own[row].key == others[row].key and own[row].targets.tolist() == others[row].targets.tolist()
        assert others[row].token_ids[:-1].tolist() == [1, *own[row].token_ids[:-1].tolist(), 2]


def test_a_key_is_that_of_the_content(tmp_path: Path) -> None:
    prepared(tmp_path, [*texts(), {"text": "good film", "label": 0}])
    keys = {row: example.key for row, example in written(tmp_path, "train").items()}
    assert keys[1] == keys[3] and len(set(keys.values())) == 3  # the same text under another label is another row


def test_groups_stand_beside_the_held_out_rows(tmp_path: Path) -> None:
    rows = [{**row, "topic": f"t{index % 3}"} for index, row in enumerate(texts())]
    prepared(tmp_path, rows, task=GROUPED)
    lines = [json.loads(line) for line in (tmp_path / "data" / "heldout_rows.jsonl").read_text().splitlines()]
    heldout = written(tmp_path, "heldout")
    assert [line["row"] for line in lines] == list(heldout)
    assert all(line["group"] == f"t{line['row'] % 3}" and line["label"] == line["row"] % 2 for line in lines)


def test_long_rows_are_dropped_for_both_or_cut_within_the_tokens_around_them(tmp_path: Path) -> None:
    rows = [*texts(), {"text": "good good good good film", "label": 1}]
    both = (words(False), words(True))
    dropped = prepared(tmp_path, rows, texts(), tokenizers=both, max_tokens=7)  # 5 tokens, 7 of the teacher, and the label
    assert (dropped.train_rows, dropped.rows_too_long, len(written(tmp_path, "train"))) == (10, 1, 10)
    assert "1 dropped as too long" in dropped.lines(DataConfig())[0]
    cut = prepared(tmp_path, rows, texts(), tokenizers=both, max_tokens=6, too_long="truncate")
    assert (cut.train_rows, cut.rows_too_long, cut.longest, cut.teacher_longest) == (11, 1, 6, 6)
    assert "1 cut as too long" in cut.lines(DataConfig(too_long="truncate"))[0]
    assert written(tmp_path, "teacher_train")[10].token_ids.tolist() == [1, 4, 4, 4, 2, 1]
    assert written(tmp_path, "train")[10].token_ids.tolist() == [4, 4, 4, 4, 6, 1]


def test_special_tokens_in_a_text_are_ordinary_characters_unless_kept(tmp_path: Path) -> None:
    rows = [*texts(), {"text": "good [SEP]", "label": 1}]
    prepared(tmp_path, rows)
    assert written(tmp_path, "train")[10].token_ids.tolist() == [4, 7, 9, 8, 1]
    prepared(tmp_path, rows, special_tokens="keep")
    assert written(tmp_path, "train")[10].token_ids.tolist() == [4, 2, 1]


def test_an_image_is_the_bits_of_its_values_colours_first(tmp_path: Path) -> None:
    def image_in(row: int, *shape: int) -> np.ndarray:
        return written(tmp_path, "train")[row].token_ids[:-1].view(np.float32).reshape(shape)

    none: Tokenizers = (None, None)
    counts = prepared(tmp_path, images(), tokenizers=none, format={"kind": "image", "divide_by": 2})
    assert counts.image_shape == (1, 2, 3) and counts.longest == 7
    assert image_in(3, 2, 3).tolist() == [[1.5, 0.5, 1.0], [1.5, 2.0, 2.5]]
    assert "images of 1 x 2 x 3" in counts.lines(DataConfig())[0] and "\n" in counts.shown_rows[0]
    picture = np.arange(6 * 5 * 3).reshape(6, 5, 3)
    rows = [{"image": (picture + row).tolist(), "label": row % 2} for row in range(10)]
    assert prepared(tmp_path, rows, tokenizers=none).image_shape == (3, 6, 5)
    for row in range(10):
        assert (image_in(row, 3, 6, 5) == (picture + row).transpose(2, 0, 1)).all()


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([*texts(), {"text": "good", "label": 2}], {}, r"^row 10: has the label 2 \(field 'label'\), and task\.labels has 0, 1$"),
        ([*texts(), {"text": "good", "label": True}], {}, r"row 10: has the label (true|True) \(field 'label'\)"),
        ([*texts(), {"text": "good", "label": None}], {}, r"row 10: has the label (null|None) \(field 'label'\)"),
        ([*texts(), {"text": "good", "label": 1.0}], {}, r"row 10: has the label 1\.0 \(field 'label'\)"),
        ([*texts(), {"text": "good"}], {}, r"row 10: has no field 'label', which task\.field names; its fields are 'text'"),
        (texts(), {"task": GROUPED}, r"row \d: has no field 'topic', which task\.group names; its fields are 'text', 'label'"),
        ([*texts(), {"text": " \n", "label": 1}], {}, r"row 10: its text is empty: there is nothing to classify"),
        ([*texts(), {"text": "\ud800", "label": 1}], {}, r"row 10: the character '\\ud800' is half of a surrogate pair"),
        ([*texts(), {"texts": "good", "label": 1}], {}, r"row 10: data\.format\.text cannot be filled in: 'text' is undefined"),
        (texts(), {"task": {"labels": [0, 1, "two"]}}, r"task\.labels has 'two', which stands in no row: nothing can be learned"),
        ([row for row in texts() if row["label"]], {}, r"task\.labels has 0, which stands in no row"),
        (
            [row for row in texts() if row["label"]], {"heldout": texts()},
            r"task\.labels has 0, which stands in held-out rows alone: .*; more rows would do, another data\.seed, or",
        ),
        (texts(), {"max_tokens": 4, "tokenizers": (words(True), None)}, r"no training row is left: all exceed data\.max_tokens"),
        (
            [row if row["label"] else {**row, "text": "bad bad bad bad"} for row in texts()], {"max_tokens": 4},
            r"task\.labels has 0, which stands in no row",
        ),
    ],
)  # fmt: skip
def test_texts_that_will_not_do_are_named(tmp_path: Path, rows: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, rows, **settings)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[1, 2], [3, 4]], r"row \d+: its image has the shape \[1, 2, 2\], that of row \d+ has \[1, 2, 3\]; images of one size"
                           r"|row \d+: its image has the shape \[1, 2, 3\], that of row 10 has \[1, 2, 2\]"),
        ([[1, 2, float("nan")], [3, 4, 5]], r"row 10: field 'image' holds nan, which is no finite number"),
        ([[1, 2, 3], [3, 4]], r"row 10: field 'image' is no image of numbers, all lines of one length"),
        (["abc"], r"row 10: field 'image' is no image of numbers"),
        ([1, 2, 3], r"row 10: field 'image' has the shape \[3\]; \[channels, height, width\] or \[height, width\] would do"),
        ([[]], r"row 10: field 'image' has the shape \[1, 1, 0\]"),
    ],
)  # fmt: skip
def test_images_that_will_not_do_are_named(tmp_path: Path, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, images(image), tokenizers=(None, None))


def test_a_row_without_its_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row \d: has no field 'picture', which data\.format\.field names; its fields are"):
        prepared(tmp_path, images(), tokenizers=(None, None), format={"kind": "image", "field": "picture"})


def test_a_text_in_which_a_tokenizer_finds_nothing_is_named(tmp_path: Path) -> None:
    deaf = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0}, unk_token="a")))
    deaf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("x", "removed")
    with pytest.raises(ValueError, match=r"row 10: its text 'xx' has no token by the tokenizer: there is nothing to classify"):
        prepared(tmp_path, [*texts(), {"text": "xx", "label": 0}], tokenizers=(deaf, None))
