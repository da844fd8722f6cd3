"""Configuration schema of models: where the weights of a teacher or a student come from."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from actors.config.networks import Network, SoftLabels
from actors.config.places import in_object_storage, resolved
from losses.section import Section

Attention = Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]


class PretrainedModel(Section):
    """A causal language model, or where the task is classification a sequence classifier or what becomes one, from the Hugging
    Face hub or a local folder."""

    kind: Literal["pretrained"]

    name: str = Field(min_length=1)
    """Hub name (``Qwen/Qwen2.5-0.5B``), path of a folder, or address of one in object storage (``s3://bucket/model``), of which
    each node makes a copy."""

    revision: str | None = None
    """Commit, tag or branch on the hub."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you say so."""

    attention: Attention = "auto"
    """How transformers computes attention, in training, evaluation, the float32 reference and the engine ``transformers``; vLLM
    chooses for itself. ``auto`` is the library's own choice where that computes the model as it is defined, else ``eager``."""

    @field_validator("name")
    @classmethod
    def _address_can_be_used(cls, name: str) -> str:
        return resolved(name) if in_object_storage(name) else name

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> "PretrainedModel":
        if self.revision is not None and in_object_storage(self.name):
            raise ValueError(
                f"revision {self.revision} is a commit of the hub, and {self.name} stands in object storage; revision null would "
                "do"
            )
        return self


class ScratchModel(Section):
    """A Llama-type decoder with random weights; its vocabulary is the run's tokenizer's."""

    kind: Literal["scratch"]

    hidden_size: int = Field(ge=8)
    """Width of the residual stream, a multiple of ``heads``."""

    layers: int = Field(ge=1)
    """Number of decoder blocks."""

    heads: int = Field(ge=1)
    """Number of attention heads."""

    kv_heads: int | None = Field(default=None, ge=1)
    """Number of key and value heads; defaults to ``heads``."""

    intermediate_size: int | None = Field(default=None, ge=8)
    """Width of the feed-forward layer; defaults to 3 times ``hidden_size``."""

    tie_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ScratchModel":
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}; "
                f"hidden_size {2 * self.heads * max(1, round(self.hidden_size / (2 * self.heads)))} would do"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}; kv_heads 1 would do")
        return self


class CutModel(Section):
    """A student of some of the teacher's layers, which keep their weights, as in DistilBERT (arXiv 1910.01108) and Minitron
    (arXiv 2407.14679). Embeddings, final norm, output head and tokenizer are the teacher's."""

    kind: Literal["cut"]
    """``cut``, for students alone."""

    layers: int | tuple[int, ...]
    """How many of the teacher's layers are kept, or which: ``10``, or ``[0, 1, 5, 9]``, counted from 0."""

    choose: Literal["evenly", "first_and_last", "least_influence"] | None = None
    """Which layers a count keeps; null for ``evenly``, and where ``layers`` names them. ``evenly``: the first, the last, and
    those between at equal distances. ``first_and_last``: as many from the front as from the end, one more from the front where
    the count is odd. ``least_influence``: those are dropped that change the hidden states least (ShortGPT, arXiv 2403.03853)."""

    influence_rows: int = Field(default=32, ge=1)
    """Training rows on which ``least_influence`` measures how much each layer changes."""

    @field_validator("layers", mode="before")
    @classmethod
    def _a_count_or_a_list(cls, layers: Any) -> Any:
        if isinstance(layers, list | tuple) and all(_is_whole(layer) for layer in layers):
            _require_in_order(layers)
        elif not _is_whole(layers):
            raise ValueError(f"{layers!r} is neither a number of layers nor a list of them; 10 would do, or [0, 1, 5, 9]")
        elif layers < 1:
            raise ValueError(f"{layers} keeps no layer of the teacher; 1 is the least")
        return layers

    @model_validator(mode="after")
    def _choose_goes_with_a_count(self) -> "CutModel":
        if self.choose is not None and not isinstance(self.layers, int):
            raise ValueError(
                f"choose is {self.choose!r}, but layers {list(self.layers)} names each layer that is kept: leave choose out, or "
                f"say layers={len(self.layers)}"
            )
        return self

    @property
    def count(self) -> int:
        """How many layers are kept."""
        return self.layers if isinstance(self.layers, int) else len(self.layers)

    def require_fewer_than(self, layers: int) -> None:
        """Raise if the teacher, which has ``layers``, has not those that are kept, or none besides.

        Raises:
            ValueError: naming the key, its value and one that would do.
        """
        if layers == 1:
            raise ValueError(
                "student.model.kind is cut, and the teacher has one layer, without which nothing is left; "
                "student.model.kind=scratch would do"
            )
        if not isinstance(self.layers, int) and self.layers[-1] >= layers:
            within = [layer for layer in self.layers if layer < layers - 1] or [0]
            raise ValueError(
                f"student.model.layers names {self.layers[-1]}, and the teacher's {layers} layers are 0 to {layers - 1}; "
                f"{[*within, layers - 1][: layers - 1]} would do"
            )
        if self.count >= layers:
            raise ValueError(
                f"student.model.layers keeps {self.count}, and the teacher has {layers} layers: nothing would be cut; "
                f"{layers // 2} would do"
            )


TeacherModel = Annotated[PretrainedModel | ScratchModel | Network | SoftLabels, Field(discriminator="kind")]
StudentModel = Annotated[PretrainedModel | ScratchModel | CutModel | Network, Field(discriminator="kind")]


def is_drawn(model: Section) -> bool:
    """Whether a run draws a model's weights from nothing but a shape: a language model from scratch, or a small network."""
    return isinstance(model, ScratchModel | Network)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_in_order(layers: Sequence[int]) -> None:
    """Raise if a list of layers is empty, or names one twice, out of order, or below 0."""
    if not layers:
        raise ValueError("[] keeps no layer of the teacher; [0] is the least")
    sound = sorted({layer for layer in layers if layer >= 0}) or [0]
    if min(layers) < 0:
        raise ValueError(f"{list(layers)} has {min(layers)}, and layers are counted from 0, the first; {sound} would do")
    if twice := [layer for layer in sound if list(layers).count(layer) > 1]:
        raise ValueError(f"{list(layers)} has {twice[0]} twice, and each layer can be kept once; {sound} would do")
    if list(layers) != sound:
        raise ValueError(f"{list(layers)} is not in the teacher's order, which is kept; {sound} would do")
