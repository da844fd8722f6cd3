"""What actors around a sampling engine have in common: what Ray is told of them, how they end, and what it means."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from actors.config.models import EngineConfig
from actors.engines.base import EngineDied, engine_environment
from actors.teacher.replica import is_device_fault

CLOSE_SECONDS = 10.0
"""How long engines have to give their devices back in order, before their processes are ended."""


class WritingFailed(RuntimeError):
    """Those who write gave up for good."""


def actor_options(engine: EngineConfig) -> dict[str, Any]:
    """Return what Ray is told of an actor around one engine; one that dies is started again, and its call repeated."""
    return {
        "num_cpus": engine.cpus,
        "num_gpus": engine.tensor_parallel if engine.gpu else 0,
        "resources": dict(engine.resources),
        "label_selector": dict(engine.labels),
        "max_restarts": engine.max_restarts,
        "max_task_retries": engine.max_restarts,
        "runtime_env": {"env_vars": engine_environment(engine)},
    }


@contextmanager
def process_ends_with_engine() -> Iterator[None]:
    """End the process where engine or device failed, so that Ray starts another; raise what else goes wrong."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, EngineDied) and not is_device_fault(error):
            raise
        traceback.print_exc()
        os._exit(1)


@contextmanager
def failures_in_words(who: str, engine: EngineConfig, logs: object) -> Iterator[None]:
    """Raise what Ray raises for calls of such actors as ``WritingFailed``, in the engine's own words where there are some."""
    try:
        yield
    except RayTaskError as error:
        raise WritingFailed(f"{who} failed: {type(error.cause).__name__}: {error.cause}") from error.cause
    except RayActorError as error:
        raise WritingFailed(
            f"{who} died {engine.max_restarts + 1} times ({str(error).strip().splitlines()[0]}); what it printed is in {logs}"
        ) from error
