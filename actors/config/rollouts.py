"""Configuration schema of text that models write. Imports neither torch nor Ray."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from actors.config.models import EngineConfig
from losses.section import MayChange, Section

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


class RolloutsConfig(Section):
    """Text that the student writes while it learns, scored by the teacher as it comes (on-policy distillation)."""

    student_share: float = Field(default=0.5, gt=0.0, le=1.0)
    """Of each step's rows, those to whose prompts the student writes the response anew; the others stay as the data has them.
    GKD's lambda (arXiv 2306.13649); 1.0 is fully on-policy."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest response; one that is cut there has no end to learn."""

    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    """Of the sampling; 0 takes the most likely token. The teacher's scores, and what is recorded, are those of temperature 1."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the fewest tokens that hold this share of the mass."""

    teacher_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability by which the teacher draws a token of these responses in the student's place: text that both write, by token
    (MiniLLM's alpha, 0.2 in arXiv 2306.08543). Needs engines that sample from the teacher, beside those that score."""

    refresh_steps: int = Field(default=1, ge=1)
    """Optimizer steps of a window, whose rows are written by the same weights."""

    inner_epochs: int = Field(default=1, ge=1)
    """How often the rows of a window are learned from, one time after the other, before others are written (4 in arXiv
    2306.08543, with windows of 256 rows). The training has so many times as many optimizer steps."""

    lag: int = Field(default=0, ge=0)
    """0: a window's rows are written by the weights with which it begins, and the workers wait for them. 1: by those with which
    the window before began, so that they are written and scored while that one trains."""

    keep_steps: Annotated[int | None, MayChange()] = Field(default=None, ge=1)
    """Of how many of the latest steps what was written is kept; null for all."""

    engine: EngineConfig | None = None
    """How the student is served; defaults to ``teacher.engine`` with one replica."""

    teacher_engine: EngineConfig | None = None
    """How the teacher is served where it draws tokens; defaults to ``teacher.engine`` with one replica."""

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
