"""Configuration schema of the trackers that show the steps of a training, beside the run's own files."""

from importlib.util import find_spec
from typing import Literal

from pydantic import Field, field_validator

from losses.section import Section


class TrackerFailed(RuntimeError):
    """A tracker does not take the training's steps; the workers start again, as after any failure from outside."""


class WandbConfig(Section):
    """Weights & Biases; its key comes from ``wandb login`` or WANDB_API_KEY."""

    project: str = Field(min_length=1)
    """Project in which each training becomes a run, grouped by the name of the run here."""

    entity: str | None = None
    """User or team; defaults to your own."""

    mode: Literal["online", "offline"] = "online"
    """Send while training, or keep in ``metrics/wandb`` for ``wandb sync``."""


class MlflowConfig(Section):
    """MLflow; credentials come from its own environment variables."""

    uri: str = Field(min_length=1)
    """Tracking server or store: ``http://host:5000``, ``sqlite:////shared/mlflow.db``."""

    experiment: str = Field(default="atkd", min_length=1)
    """Experiment in which each training becomes a run; made if it is not there."""

    @field_validator("uri")
    @classmethod
    def _uri_names_one_place(cls, uri: str) -> str:
        if "://" not in uri or (uri.startswith("sqlite:///") and not uri.startswith("sqlite:////")):
            raise ValueError(
                f"uri {uri!r} is relative, and workers stand in folders of their own; http://host:5000 or "
                "sqlite:////a/folder/mlflow.db would do"
            )
        return uri


class TrackingConfig(Section):
    """Where the first worker writes the steps besides ``metrics/*.jsonl``. Changes no result, so it may change on the way."""

    tensorboard: bool = True
    """Write ``metrics/tensorboard``."""

    wandb: WandbConfig | None = None
    """Weights & Biases; null for none. Needs ``pip install '.[wandb]'``."""

    mlflow: MlflowConfig | None = None
    """MLflow; null for none. Needs ``pip install '.[mlflow]'``."""


def require_installed(tracking: TrackingConfig) -> None:
    """Raise if the package of a tracker is not installed.

    Raises:
        ValueError: naming the key and the command that installs it.
    """
    for name, wanted in (("wandb", tracking.wandb), ("mlflow", tracking.mlflow)):
        if wanted is not None and find_spec(name) is None:
            raise ValueError(
                f"tracking.{name} is set, but {name} is not installed: pip install '.[{name}]' on every node, or "
                f"tracking.{name}=null would do"
            )
