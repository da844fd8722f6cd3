"""Configuration schema of text that models write. Imports neither torch nor Ray."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from actors.config.models import EngineConfig
from losses.section import MayChange, NotSearchable, Searchable, Section

Wire = Literal["top_k", "candidates", "hidden"]
"""What the teacher says of each token that the student writes."""

LOWEST_TEMPERATURE = 0.01
"""The lowest that vLLM samples at, 0 aside."""


class ResponsesConfig(Section):
    """Responses that a model writes to the data's prompts, once, in the place of the data's own."""

    writer: Literal["teacher", "student"]
    """Who writes them: the teacher, as in sequence-level distillation (arXiv 1606.07947), or the student as it is before it is
    distilled. Held-out rows keep the data's own."""

    samples_per_prompt: int = Field(default=1, ge=1)
    """Rows made of each prompt."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest response; one that is cut there has no end to learn."""

    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    """Of the sampling; 0 takes the most likely token."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the fewest tokens that hold this share of the mass."""

    engine: EngineConfig | None = None
    """How the writer is served; defaults to ``teacher.engine``."""

    @model_validator(mode="after")
    def _sampling_is_possible(self) -> "ResponsesConfig":
        require_temperature(self.temperature)
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"samples_per_prompt {self.samples_per_prompt} with temperature 0 writes each response so many times; "
                "samples_per_prompt 1, or temperature 1.0, would do"
            )
        return self


class ReplayConfig(Section):
    """Responses of earlier steps that are learned from again, with the scores that they had (DistiLLM, arXiv 2402.03898)."""

    rows: int = Field(default=1000, ge=1)
    """From so many of the latest responses one is drawn."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)] | Literal["progress"] = "progress"
    """Of the rows that the student would write, those that are drawn from the earlier ones instead; ``progress``: the share of
    the training that is done, so that ever fewer are written anew."""


class AdaptiveShareConfig(Section):
    """A student's share that grows when the loss on held-out rows rises (DistiLLM, arXiv 2402.03898)."""

    first: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share at the beginning."""

    every_steps: int = Field(default=100, ge=1)
    """Optimizer steps between two measurements of the student's loss on the held-out rows."""

    tolerance: float = Field(default=0.1, ge=0.0)
    """Nats per target by which it must have risen since the last change, or the beginning."""

    raise_by: float = Field(default=0.1, gt=0.0, le=1.0)
    """What is then added to the share, up to ``student_share``."""


class RolloutsConfig(Section):
    """Text that the student writes while it learns, scored by the teacher as it comes (on-policy distillation)."""

    student_share: Annotated[float, Searchable("where the configuration has rollouts")] = Field(default=0.5, gt=0.0, le=1.0)
    """Of each step's rows, those to whose prompts the student writes the response anew; the others stay as the data has them.
    GKD's lambda (arXiv 2306.13649); 1.0 is fully on-policy."""

    max_new_tokens: Annotated[int, Searchable("up to what the configuration says")] = Field(default=256, ge=1)
    """Longest response; one that is cut there has no end to learn."""

    temperature: Annotated[float, Searchable("where the configuration has rollouts")] = Field(default=1.0, ge=0.0, le=2.0)
    """Of the sampling; 0 takes the most likely token. The teacher's scores, and what is recorded, are those of temperature 1."""

    top_p: Annotated[float, Searchable("where the configuration has rollouts")] = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the fewest tokens that hold this share of the mass."""

    teacher_share: Annotated[float, Searchable("where the configuration has rollouts")] = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability by which the teacher draws a token of these responses in the student's place: text that both write, by token
    (MiniLLM's alpha, 0.2 in arXiv 2306.08543). Needs engines that sample from the teacher, beside those that score."""

    refresh_steps: Annotated[int, Searchable("where the configuration has rollouts")] = Field(default=1, ge=1)
    """Optimizer steps of a window, whose rows are written by the same weights."""

    inner_epochs: Annotated[int, Searchable("where the configuration has rollouts")] = Field(default=1, ge=1)
    """How often the rows of a window are learned from, one time after the other, before others are written (4 in arXiv
    2306.08543, with windows of 256 rows). The training has so many times as many optimizer steps."""

    lag: Annotated[int, Searchable("where the configuration has rollouts")] = Field(default=0, ge=0)
    """0: a window's rows are written by the weights with which it begins, and the workers wait for them. 1: by those with which
    the window before began, so that they are written and scored while that one trains."""

    adaptive_share: Annotated[AdaptiveShareConfig | None, Searchable("where the configuration has rollouts")] = None
    """Let the share begin lower and grow, up to ``student_share``; null keeps it as it is."""

    replay: Annotated[ReplayConfig | None, Searchable("where the configuration has rollouts")] = None
    """Learn again from what was written for earlier steps; null for none."""

    wire: Annotated[Wire, NotSearchable("one teacher scores for all trials")] = "top_k"
    """What the teacher says of each token that the student writes: ``top_k``, its log-probabilities of that token and of its own
    ``scores.top_k`` most likely ones; ``candidates``, those and its log-probabilities of as many tokens that the student holds
    most likely; ``hidden``, its last hidden states too, of which its output head makes all log-probabilities on the workers."""

    keep_steps: Annotated[int | None, MayChange(), NotSearchable("it says what is kept")] = Field(default=None, ge=1)
    """Of how many of the latest steps what was written is kept; null for all."""

    engine: Annotated[
        EngineConfig | None, NotSearchable("each trial has samplers of its own, all alike")
    ] = None
    """How the student is served; defaults to ``teacher.engine`` with one replica."""

    teacher_engine: Annotated[
        EngineConfig | None, NotSearchable("each trial has samplers of its own, all alike")
    ] = None
    """How the teacher is served where it draws tokens; defaults to ``teacher.engine`` with one replica."""

    @property
    def learns_from_data(self) -> bool:
        """Whether rows are learned from as the data has them, or the student answers all prompts."""
        return self.student_share < 1 or self.adaptive_share is not None

    @model_validator(mode="after")
    def _shares_agree(self) -> "RolloutsConfig":
        adaptive = self.adaptive_share
        if adaptive is not None and adaptive.first > self.student_share:
            raise ValueError(
                f"adaptive_share.first {adaptive.first:g} lies above student_share {self.student_share:g}, up to which it grows; "
                f"student_share={min(1.0, adaptive.first + adaptive.raise_by):g} would do"
            )
        window = self.refresh_steps * self.inner_epochs
        if adaptive is not None and adaptive.every_steps % window:
            nearest = max(1, round(adaptive.every_steps / window)) * window
            raise ValueError(
                f"adaptive_share.every_steps {adaptive.every_steps} is no multiple of the {window} steps of a window, which have "
                f"one share; adaptive_share.every_steps={nearest} would do"
            )
        if self.wire == "candidates" and self.teacher_share > 0:
            raise ValueError(
                f"wire is candidates, but teacher_share is {self.teacher_share:g}, and of tokens that the teacher draws the "
                "student notes no others; teacher_share=0 would do, or wire=hidden, or wire=top_k"
            )
        if self.replay is not None and self.keep_steps is not None:
            raise ValueError(
                f"keep_steps is {self.keep_steps}, but replay learns again from what was written for earlier steps; "
                "keep_steps=null would do"
            )
        if self.wire == "hidden" and (self.student_share < 1 or adaptive is not None):
            seen = f"student_share is {self.student_share:g}" if adaptive is None else "adaptive_share begins lower"
            raise ValueError(
                f"wire is hidden, but {seen}, and of rows that stay as the data has them no hidden states are kept; "
                "student_share=1.0 without adaptive_share would do, or wire=candidates"
            )
        return self

    @model_validator(mode="after")
    def _samplers_are_possible(self) -> "RolloutsConfig":
        require_temperature(self.temperature)
        for key, engine in (("engine", self.engine), ("teacher_engine", self.teacher_engine)):
            if engine is not None and engine.replicas == "auto":
                raise ValueError(f"{key}.replicas is auto, but samplers stand beside teacher and student; 1 would do")
        if self.teacher_engine is not None and self.teacher_share == 0:
            raise ValueError(
                "teacher_engine says how the teacher draws tokens, but teacher_share is 0; teacher_share=0.2 would do, or "
                "teacher_engine=null"
            )
        return self


def require_temperature(temperature: float) -> None:
    """Raise a ``ValueError`` if vLLM would sample at another temperature than this."""
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"temperature {temperature:g} lies between 0 and {LOWEST_TEMPERATURE}, where vLLM samples at {LOWEST_TEMPERATURE}; "
            "temperature 0, which takes the most likely token, would do"
        )
