"""A few rows, scored by the doctor as a run would score them all: actor, engine, checks, shards on disk, and back."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray

from actors.engines.base import EngineFactory, TeacherSpec
from actors.environment import task_environment
from actors.examples import write_examples
from actors.records import Example
from actors.score_store.store import ScoreStore
from actors.teacher.pool import TeacherPool
from actors.teacher.replica_set import TeacherFailed
from orchestrator.cluster.run_copies import PassingFolder, passing_folder
from orchestrator.config.run import RunConfig
from orchestrator.doctor.checks import check_refused
from orchestrator.run.score_parity import Finding


def folder_of_doctor(config: RunConfig, run: Path) -> AbstractContextManager[PassingFolder]:
    """Return a folder within a run's, for what replicas and measuring tasks hand each other; it goes in the end. Needs Ray."""
    return passing_folder(run, config.mirror.address if config.mirror is not None else None, "doctor-")


def rows_path(folder: PassingFolder) -> Path:
    """Return the file of the rows that were scored into a folder."""
    return folder.path / "rows.arrow"


def score_probe(
    spec: TeacherSpec, rows: Sequence[Example], folder: PassingFolder, vocab_size: int, engine_factory: EngineFactory, *,
    exact: bool = False,
) -> list[str] | Finding:  # fmt: skip
    """Score rows alone, and together, in the teacher's pool; return the places of the two stores. Needs Ray.

    ``exact`` says whether the stores keep log-probabilities as they are, as a run
    does with those of classes. Return a finding where the scores do not pass the checks that every shard passes.

    Raises:
        TeacherFailed: if the teacher cannot be served.
    """
    write_examples(rows_path(folder), rows)
    folder.share()
    identity = {"top_k": spec.top_k, "vocab_size": vocab_size, "ids_below": spec.ids_below or vocab_size}
    if exact:
        identity["exact"] = True
    stores = [
        ScoreStore.open_or_create(folder.place(name), identity, len(rows), rows_per_shard)
        for name, rows_per_shard in (("alone", 1), ("together", len(rows)))
    ]
    with TeacherPool(spec, engine_factory=engine_factory) as pool:
        try:
            for store in stores:
                for _ in pool.score_missing(rows_path(folder), store):
                    pass
        except TeacherFailed as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            return check_refused(str(error.__cause__))
    return [store.place for store in stores]


def measured_on(measuring: Callable[..., Any], cpus: float, gpu: bool, *given: Any) -> Any:
    """Return what a function measures in a Ray task with these devices; it is given the device's name last."""
    remote = ray.remote(measuring).options(
        name="doctor", num_cpus=cpus, num_gpus=int(gpu), runtime_env={"env_vars": task_environment(cpus, gpu)}
    )
    return ray.get(remote.remote(*given, "cuda" if gpu else "cpu"))


def on_gpu(spec: TeacherSpec) -> bool:
    """Whether the reference is computed on a GPU: what one cannot hold in 16 bits, none holds in 32."""
    return spec.engine.gpu and spec.engine.tensor_parallel == 1
