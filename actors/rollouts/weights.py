"""Weights on their way from the student's workers to its samplers: a new folder for each version, whole or not there.

T tokens.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.config.places import in_object_storage
from actors.files import whole_folder
from actors.rollouts.weight_copies import PROOF, WeightCopies, step_of
from actors.score_store.rollout_log import poll_seconds
from actors.storage.folder import open_folder


@dataclass(frozen=True, slots=True)
class Proof:
    """What the student itself predicts on a row, by which a sampler is compared with it."""

    token_ids: np.ndarray
    """int32 [T]."""
    logprobs: np.ndarray
    """float32 [T-1], the student's log-probability of each token but the first, before it is cast for the sampler."""

    def write(self, folder: Path) -> None:
        """Put it beside the weights."""
        content = {"token_ids": self.token_ids.tolist(), "logprobs": [float(value) for value in self.logprobs]}
        (folder / PROOF).write_text(json.dumps(content))

    @staticmethod
    def read(folder: Path) -> "Proof":
        """Return what stands beside the weights."""
        return Proof.parse((folder / PROOF).read_bytes())

    @staticmethod
    def parse(content: bytes) -> "Proof":
        """Return what its file says."""
        said = json.loads(content)
        return Proof(np.array(said["token_ids"], np.int32), np.array(said["logprobs"], np.float32))


class WeightFolders:
    """The folders of one student's weights, by the optimizer step after which they were taken; whole once their proof is there.

    Args:
        place: path or address of the folder that holds them.
    """

    def __init__(self, place: Path | str) -> None:
        self._folder, self._poll_seconds = open_folder(place), poll_seconds(place)
        self._copies = WeightCopies(str(place)) if in_object_storage(place) else None

    def write(self, step: int, save: Callable[[Path], None]) -> None:
        """Let ``save`` fill the folder of the weights after a step, its proof included."""
        if self._copies is not None:
            self._copies.write(_name(step), save)
            return
        path = Path(self.place(step))
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(path) as unfinished:
            save(unfinished)

    def place(self, step: int) -> str:
        """Return the path or the address of the folder of the weights after a step."""
        return self._folder.place_of(_name(step))

    def proof(self, step: int) -> Proof:
        """Return what stands beside weights that are there."""
        return Proof.parse(self._folder.read(f"{_name(step)}/{PROOF}"))

    def is_there(self, step: int) -> bool:
        """Whether the weights after a step are there."""
        return self._folder.size(f"{_name(step)}/{PROOF}") is not None

    def wait_for(self, step: int, seconds: float) -> bool:
        """Wait some time for the weights after a step; return whether they are there."""
        until = time.monotonic() + seconds
        while not self.is_there(step):
            if time.monotonic() > until:
                return False
            time.sleep(min(self._poll_seconds, seconds))
        return True

    def newest(self) -> int:
        """Return after which step the newest weights that are there were taken; 0 where there are none."""
        return next((step for step in sorted(self._steps(), reverse=True) if self.is_there(step)), 0)

    def discard_before(self, step: int) -> None:
        """Remove the weights of earlier steps."""
        for there in self._steps():
            if there < step:
                self._folder.remove_folder(_name(there))

    def _steps(self) -> list[int]:
        return [step for step in map(step_of, self._folder.folders()) if step is not None]


def _name(step: int) -> str:
    return f"step-{step:08d}"
