"""A row as it is classified: read from its fields, or refused in words that name it."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.config.data import DataConfig
from orchestrator.config.formats import FormatConfig, ImageFormat, TextFormat
from orchestrator.config.task import ClassificationTask
from orchestrator.data.field_templates import field_template
from orchestrator.data.mixture import NumberedRow
from orchestrator.data.row_values import fields_of, require_unicode, shown

SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A row as it is classified."""

    number: int
    """Its index, counted through all sources of its split."""
    text: str | None
    """What is read; None for an image."""
    image: np.ndarray | None
    """float32 [channels, height, width]; None for a text."""
    label: int
    """Which of the labels it has."""
    group: str | None
    """By what its measures are told apart."""
    place: str = ""
    """Where it stands, in words."""

    @property
    def key(self) -> str:
        """Name of its content: 32 hex digits."""
        digest = hashlib.blake2b(digest_size=16)
        if self.text is not None:
            digest.update(b"text\0" + self.text.encode())
        if self.image is not None:
            digest.update(f"image {self.image.shape}\0".encode() + self.image.astype("<f4").tobytes())
        digest.update(f"\0{self.label}".encode())
        return digest.hexdigest()


def read_row(row: NumberedRow, data: DataConfig, task: ClassificationTask) -> LabelledRow:
    """Return a row's features and label.

    Raises:
        ValueError: naming the row, and what is wrong with it.
    """
    try:
        label, group = label_of(row.fields, task), group_of(row.fields, task)
        text, image = content_of(row.fields, data.formats[row.source])
        return LabelledRow(row.number, text, image, label, group, row.place)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from error


def content_of(fields: Any, format: FormatConfig) -> tuple[str | None, np.ndarray | None]:
    """Return what is to be classified: a row's text, or its image as float32 [channels, height, width].

    Raises:
        ValueError: saying what is wrong with it.
    """
    if isinstance(format, TextFormat):
        text = require_unicode(field_template(format.text, "data.format.text").fill(fields))
        if not text.strip():
            raise ValueError("its text is empty: there is nothing to classify")
        return text, None
    assert isinstance(format, ImageFormat), "the configuration was checked"
    return None, image_of(fields, format)


def label_of(fields: Any, task: ClassificationTask) -> int:
    """Return which of the labels a row has."""
    if task.field not in fields:
        raise ValueError(f"has no field {task.field!r}, which task.field names; {fields_of(fields)}")
    value, texts = fields[task.field], [str(label) for label in task.labels]
    if str(value) not in texts or isinstance(value, bool | list | dict) or value is None:
        raise ValueError(f"has the label {shown(value)} (field {task.field!r}), and task.labels has {', '.join(texts)}")
    return texts.index(str(value))


def group_of(fields: Any, task: ClassificationTask) -> str | None:
    """Return by what a row's measures are told apart."""
    if task.group is None:
        return None
    if task.group not in fields:
        raise ValueError(f"has no field {task.group!r}, which task.group names; {fields_of(fields)}")
    return str(fields[task.group])


def image_of(fields: Any, format: ImageFormat) -> np.ndarray:
    """Return a row's image as float32 [channels, height, width]."""
    if format.field not in fields:
        raise ValueError(f"has no field {format.field!r}, which data.format.field names; {fields_of(fields)}")
    value = fields[format.field]
    try:
        image = np.asarray(value, dtype=np.float32) / np.float32(format.divide_by)
    except (TypeError, ValueError) as error:
        raise ValueError(f"field {format.field!r} is no image of numbers, all lines of one length: {error}") from error
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3 and image.shape[2] in (1, 3, 4) and image.shape[0] not in (1, 3, 4):
        image = image.transpose(2, 0, 1)  # pictures have their colours last
    if image.ndim != 3 or not image.size:
        raise ValueError(
            f"field {format.field!r} has the shape {list(image.shape)}; [channels, height, width] or [height, width] would do"
        )
    if not np.isfinite(image).all():
        raise ValueError(f"field {format.field!r} holds {image[~np.isfinite(image)][0]}, which is no finite number")
    return np.ascontiguousarray(image)


def require_labels(train: Sequence[LabelledRow], heldout: Sequence[LabelledRow], task: ClassificationTask) -> None:
    """Raise if a label has no training row."""
    trained, measured = {row.label for row in train}, {row.label for row in heldout}
    if missing := [label for label in range(len(task.labels)) if label not in trained]:
        where = "stands in held-out rows alone" if missing[0] in measured else "stands in no row"
        raise ValueError(
            f"task.labels has {task.labels[missing[0]]!r}, which {where}: nothing can be learned of it; more rows would do, "
            "another data.seed, or task.labels without it"
        )


def require_one_shape(rows: Sequence[LabelledRow]) -> tuple[int, ...]:
    """Return the shape of all images; empty for texts."""
    images = [(row, row.image) for row in rows if row.image is not None]
    if not images:
        return ()
    shape = images[0][1].shape
    for row, image in images:
        if image.shape != shape:
            raise ValueError(
                f"{row.place}: its image has the shape {list(image.shape)}, that of {images[0][0].place} has {list(shape)}; "
                "images of one size would do"
            )
    return tuple(shape)


def shown_row(row: LabelledRow, place: str, task: ClassificationTask) -> str:
    """Return a row for the log."""
    label = f"{place}, labelled {task.labels[row.label]}"
    if row.image is None:
        text = row.text or ""
        return f"{label}: {text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + ' ...'}"
    pixels = row.image.mean(axis=0)
    low, high = float(pixels.min()), float(pixels.max())
    shades = " .:-=+*#%@"
    scaled = (pixels - low) / (high - low if high > low else 1.0) * (len(shades) - 1)
    step = math.ceil(max(pixels.shape) / 32)
    return f"{label}:\n" + "\n".join("".join(shades[round(float(value))] for value in line[::step]) for line in scaled[::step])
