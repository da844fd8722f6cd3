"""The tasks of the lm-evaluation-harness: found by name, built, and refused in words before a model is loaded."""

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lm_eval.tasks import TaskManager

from actors.config.benchmarks import BenchmarksConfig
from actors.evaluation.task_folder import require_task_folder, settled_folder

KEY = "evaluate.benchmarks"
FILE_KINDS = ("arrow", "csv", "json", "parquet", "text")
"""Names by which a task says that its rows stand in files, where others name a data set of the hub."""
NEEDS_SCIKIT_LEARN = ("f1_score", "matthews_corrcoef")
"""Aggregations of the harness that import scikit-learn when all answers are there."""
NAMES_SHOWN = 3


class TaskFinder:
    """The tasks that a configuration can name."""

    def __init__(self, settings: BenchmarksConfig) -> None:
        """Read what tasks there are; those of the harness, which takes seconds, only where the folder has not all.

        Raises:
            ValueError: if the folder is not there, holds no task, or one that is not YAML.
        """
        self._folder = settled_folder(settings.folder)
        if self._folder is not None:
            require_task_folder(self._folder)
            self._manager = TaskManager(include_path=self._folder, include_defaults=False)
            if not self._manager.all_tasks:
                raise ValueError(
                    f"{KEY}.folder {self._folder} holds no task of the harness; a file such as my_task.yaml with the keys task, "
                    "dataset_path, output_type, doc_to_text and doc_to_target would do"
                )
            if all(self._is_whole(name) for name in settings.tasks):
                return
        self._manager = TaskManager(include_path=self._folder)

    def require_names(self, names: Sequence[str]) -> None:
        """Raise a ``ValueError`` for the first name that is none, with names that are like it."""
        known = self._manager.all_tasks
        for name in names:
            if name not in self._manager.task_index:
                near = difflib.get_close_matches(name, known, n=NAMES_SHOWN, cutoff=0.6)
                places = f" or {self._folder}" if self._folder is not None else ""
                raise ValueError(
                    f"{KEY}.tasks: the harness{places} has no task {name!r}; "
                    + (f"did you mean {' or '.join(near)}?" if near else "gsm8k would do")
                )

    def load(self, name: str) -> Mapping[str, Any]:
        """Return what the harness makes of a name: ``tasks`` by name and ``groups`` by name, rows included.

        Raises:
            ValueError: if the rows cannot be loaded, or the task cannot be built.
        """
        try:
            with self._beside_the_rows():
                return self._manager.load([name])
        except OSError as error:
            raise ValueError(self._why_no_rows(name, error)) from error
        except Exception as error:  # tasks are YAML and Python of others: whatever they raise, it is the task that is wrong
            raise ValueError(f"{KEY}.tasks: {name!r}{self._place(name)} cannot be built: {_words(error)}") from error

    def _is_whole(self, name: str) -> bool:
        """Whether a name is known with all that it is made of."""
        entry = self._manager.task_index.get(name)
        if entry is None or name not in self._manager.all_groups:
            return entry is not None
        members = (entry.cfg or {}).get("task", ())
        return all(self._is_whole(one if isinstance(one, str) else one.get("task", "")) for one in members)

    @contextlib.contextmanager
    def _beside_the_rows(self) -> Iterator[None]:
        with contextlib.chdir(self._folder) if self._folder is not None else contextlib.nullcontext():
            yield

    def _place(self, name: str) -> str:
        entry = self._manager.task_index.get(name)
        return "" if entry is None or entry.yaml_path is None else f" of {entry.yaml_path}"

    def _why_no_rows(self, name: str, error: OSError) -> str:
        entry = self._manager.task_index.get(name)
        source = (entry.cfg or {}).get("dataset_path") if entry is not None else None
        if source in FILE_KINDS:
            return (
                f"{KEY}.tasks: the rows of {name!r}{self._place(name)} cannot be loaded: {_words(error)}; dataset_kwargs: "
                f"{{data_files: {{test: FILE}}}}, with a path relative to {KEY}.folder, would do"
            )
        origin = f"{name!r}, which come from the hub ({source}), " if source else f"{name!r} "
        return (
            f"{KEY}.tasks: the rows of {origin}cannot be loaded: {_words(error)}; a network, a cache that holds them (HF_HOME), "
            f"or a task of {KEY}.folder that reads your own files would do"
        )


def require_tasks(settings: BenchmarksConfig) -> None:
    """Raise if a task could not be measured; the rows of all tasks are fetched for it.

    Raises:
        ValueError: naming the key, what is wrong with it and what would do.
    """
    finder = TaskFinder(settings)
    finder.require_names(settings.tasks)
    for name in settings.tasks:
        for task in finder.load(name)["tasks"].values():
            require_measurable(task)


def require_measurable(task: Any) -> None:
    """Raise a ``ValueError`` if a task runs what a model wrote, needs more than text, or a package that is not there."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"{KEY}.tasks: {task.task_name} runs code that the model writes, which is not done here; gsm8k would do")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"{KEY}.tasks: {task.task_name} shows images or plays sounds, and models here read text; gsm8k would do")
    needing = [name for name, combine in task.aggregation().items() if getattr(combine, "__name__", "") in NEEDS_SCIKIT_LEARN]
    if needing and find_spec("sklearn") is None:
        raise ValueError(
            f"{KEY}.tasks: {task.task_name} computes {', '.join(needing)} by scikit-learn, which is not installed: pip install "
            "scikit-learn on every node would do"
        )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
