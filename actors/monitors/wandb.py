"""Steps of a training in Weights & Biases; the only file that knows wandb."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from actors.config.tracking import TrackerFailed, WandbConfig


class WandbLog:
    """One run of Weights & Biases, resumed by the id that stands in ``<name>.wandb``.

    Of steps that are repeated after a kill, Weights & Biases keeps the first.

    Raises:
        TrackerFailed: if the service does not accept the run.
    """

    def __init__(self, tracking: WandbConfig, folder: Path, run: str, name: str, about: Mapping[str, Any]) -> None:
        id_file = folder / f"{name}.wandb"
        try:
            self._run = wandb.init(
                project=tracking.project, entity=tracking.entity, mode=tracking.mode, dir=str(folder), group=run,
                name=f"{run}/{name}", id=id_file.read_text() if id_file.exists() else None, resume="allow",
                config=dict(about), reinit="create_new", settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise TrackerFailed(f"tracking.wandb: {error}; mode offline, or tracking.wandb=null would do") from error
        id_file.write_text(self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step; sent by wandb's own process."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
