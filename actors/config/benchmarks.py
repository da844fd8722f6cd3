"""Configuration schema of benchmarks: tasks of EleutherAI's lm-evaluation-harness, for teacher and student."""

from importlib.util import find_spec
from typing import Literal

from pydantic import Field, field_validator

from losses.section import LARGEST_SEED, Section

MeasuredModel = Literal["teacher", "student_before", "student_after"]
"""The models of a run, as their files are called."""


class BenchmarksConfig(Section):
    """Tasks of the lm-evaluation-harness that the models of a run are measured by. Needs ``pip install '.[benchmarks]'``."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags that the harness knows (``gsm8k``, ``mmlu``), or that ``folder`` has."""

    folder: str | None = None
    """Folder with tasks of your own, each a YAML file in the harness's form; paths of rows in them are relative to this folder.
    Python that stands in it is run."""

    models: tuple[MeasuredModel, ...] = Field(default=("teacher", "student_before", "student_after"), min_length=1)
    """Which models are measured."""

    shots: int | None = Field(default=None, ge=0)
    """Examples before each question; null for as many as the task says. A task that says 0 keeps 0."""

    limit: int | None = Field(default=None, ge=1)
    """Rows of a task that are measured, the first ones; null for all. A group has so many of each of its tasks."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """Which of the harness's models answers. Devices and type are those of ``evaluate``."""

    batch_rows: int = Field(default=8, ge=1)
    """Texts that are computed at one time."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; null for what the task says, else the harness's 256."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest text in tokens, prompt and answer together; null for what the model takes. Longer prompts lose their start."""

    apply_chat_template: bool = False
    """Ask in turns, by the chat template of the run's tokenizer."""

    seed: int = Field(default=1234, ge=0, le=LARGEST_SEED)
    """Draws the examples before a question; 1234 is the harness's own."""

    kv_cache_mib: int = Field(default=256, ge=1)
    """Size of vLLM's key-value cache on a machine without GPUs; it must hold ``max_length`` tokens."""

    @field_validator("tasks", "models")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands twice; once would do")
        return names

    @field_validator("tasks")
    @classmethod
    def _names_are_given(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if any(not task.strip() for task in tasks):
            raise ValueError("holds an empty name; [gsm8k] would do")
        return tasks


def require_models_that_load(benchmarks: BenchmarksConfig, teacher: str) -> None:
    """Raise if the teacher is to be measured and is not loaded; ``teacher`` is ``evaluate.teacher``.

    Raises:
        ValueError: with the models that would do.
    """
    if teacher == "scores" and "teacher" in benchmarks.models:
        others = ", ".join(name for name in benchmarks.models if name != "teacher") or "student_after"
        raise ValueError(
            f"teacher is scores, so that the teacher is not loaded, but benchmarks.models names it; benchmarks.models=[{others}] "
            "would do, or teacher=model"
        )


def require_installed(benchmarks: BenchmarksConfig) -> None:
    """Raise if a package that the benchmarks need is not installed.

    Raises:
        ValueError: naming the key and the command that installs it.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(
            "evaluate.benchmarks is set, but the lm-evaluation-harness is not installed: pip install '.[benchmarks]' on every "
            "node, or evaluate.benchmarks=null would do"
        )
    if benchmarks.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError(
            "evaluate.benchmarks.engine is vllm, but vLLM is not installed: pip install '.[vllm]' on every node, or "
            "evaluate.benchmarks.engine=transformers would do"
        )
