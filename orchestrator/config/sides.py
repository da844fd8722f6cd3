"""Configuration schema of the two sides of a run, teacher and student, and of the tokenizer they share. Imports no torch."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from actors.config.model_kinds import CutModel, StudentModel, TeacherModel
from actors.config.models import EngineConfig, LoraAdapter, SimilarTokens, TrainConfig
from actors.config.workers import WorkersConfig
from losses.section import MayChange, Searchable, Section


class TokenizerConfig(Section):
    """A byte-level BPE tokenizer trained on the run's own training text, for models made from scratch."""

    vocab_size: int = Field(default=2048, ge=300)
    """Tokens in its vocabulary, special ones included."""


class FinetuneConfig(Section):
    """Fine-tuning on the data with cross entropy, by the student's own loop."""

    train: TrainConfig
    """How much, how large, how often."""

    workers: Annotated[WorkersConfig, MayChange()] = WorkersConfig()
    """Who does it."""


class LabelWords(Section):
    """Have a causal language model classify: of each label its word is looked at, as the continuation of a prompt."""

    prompt: str = Field(min_length=1)
    """Jinja template over the row's fields: all that the model reads before a word, its own special tokens included."""

    words: tuple[str, ...] | None = None
    """One word a label, in the order of ``task.labels``, with the space before it if there is to be one; null for the labels' own
    texts."""

    def texts(self, labels: Sequence[str | int]) -> tuple[str, ...]:
        """Return the word of each label."""
        return tuple(str(label) for label in labels) if self.words is None else self.words


class TeacherConfig(Section):
    """The large model."""

    model: TeacherModel
    """Which model, or what shape of one."""

    finetune: FinetuneConfig | None = None
    """Fine-tune it on the data first, as the paper's teachers are; null to take it as it is."""

    label_words: LabelWords | None = None
    """Where the task is classification and the model a causal language model: how it answers; null for a classifier."""

    similar_tokens: SimilarTokens | None = None
    """Of a language model: teach the neighbours of each target by its embeddings, not what it predicts; null for that."""

    calibrate: bool = False
    """Where the task is classification: divide its logits by the temperature that gives the held-out labels the least log loss
    (arXiv 1706.04599)."""

    engine: EngineConfig = EngineConfig()
    """How it is served for scoring."""

    @field_validator("model", mode="before")
    @classmethod
    def _not_cut(cls, model: Any) -> Any:
        if isinstance(model, CutModel) or (isinstance(model, dict) and model.get("kind") == "cut"):
            raise ValueError("kind is cut, and a teacher has none that it could be cut from; kind pretrained or scratch would do")
        return model


class StudentConfig(Section):
    """The small model."""

    model: Annotated[
        StudentModel, Searchable("where it is made from nothing, by `kind: scratch` or a small network, and is not fine-tuned")
    ]
    """Which model, what shape of one, or which layers of the teacher."""

    finetune: FinetuneConfig | None = None
    """Train it on the data first; for students made from scratch, which otherwise know no language."""

    lora: Annotated[LoraAdapter | None, Searchable("where the student is a language model")] = None
    """Train adapters instead of all weights."""
