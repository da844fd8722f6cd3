"""Configuration schema of what is learned: the next tokens of a text, or the label of a row. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from losses.section import Section


class LanguageModelTask(Section):
    """Each token of the responses, from all before it."""

    kind: Literal["language_model"]
    """``language_model``, the default."""


class ClassificationTask(Section):
    """One of several labels of each row."""

    kind: Literal["classification"]
    """``classification``."""

    labels: tuple[str | int, ...]
    """All labels, in the order of the model's outputs; a pretrained classifier's own order."""

    field: str = "label"
    """Name of the field with a row's label: one of ``labels``, or its text."""

    ordered: bool = False
    """Whether the labels are grades, from the lowest to the highest: then quadratic weighted kappa is measured."""

    group: str | None = None
    """Name of a field by whose values the measures are told apart, such as a question; null for none."""

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_texts_or_numbers(cls, labels: Any) -> Any:
        for label in labels if isinstance(labels, list | tuple) else ():
            if isinstance(label, bool):
                raise ValueError(
                    f"has {label}, which YAML makes of words such as yes, on and true, or no, off and false; in quotes they stay "
                    "words: ['yes', 'no'] would do"
                )
            if isinstance(label, float):
                raise ValueError(f"has {label}, neither a text nor a whole number; '{label}' or {label:.0f} would do")
        return labels

    @model_validator(mode="after")
    def _labels_are_several(self) -> "ClassificationTask":
        texts = [str(label) for label in self.labels]
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise ValueError(f"labels has {twice[0]!r} twice; once would do")
        if len(texts) < 2:
            raise ValueError(f"labels {'has ' + repr(texts[0]) + ' alone' if texts else 'is empty'}; two are the least")
        return self


TaskConfig = Annotated[LanguageModelTask | ClassificationTask, Field(discriminator="kind")]
