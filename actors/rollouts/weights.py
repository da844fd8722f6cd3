"""Weights on their way from the student's workers to its samplers: a new folder for each version, whole or not there.

T tokens.
"""

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROOF = "proof.json"


def weights_step(step: int, refresh_steps: int, lag: int, inner_epochs: int = 1) -> int:
    """Return after which optimizer step the weights are taken that write the rows of ``step``, which counts from 1.

    Steps come in windows of ``refresh_steps``. The rows of a window are written by the weights with which it begins, or with
    which the one ``lag`` windows before began; those of the first by the weights that the student begins with, after step 0.
    Where each window is learned from ``inner_epochs`` times, ``step`` counts its rows once, and weights count all steps.
    """
    return max(0, (step - 1) // refresh_steps - lag) * refresh_steps * inner_epochs


def steps_written_by(weights: int, refresh_steps: int, lag: int, total_steps: int, inner_epochs: int = 1) -> range:
    """Return the steps whose rows are written by the weights after step ``weights``; empty where nobody waits for them.

    Arguments as of ``weights_step``, whose ``step`` ends at ``total_steps``.
    """
    if weights % (refresh_steps * inner_epochs):
        return range(0)
    window = weights // (refresh_steps * inner_epochs) + lag
    first = 1 if weights == 0 else window * refresh_steps + 1
    return range(first, min((window + 1) * refresh_steps, total_steps) + 1)


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
        content = json.loads((folder / PROOF).read_text())
        return Proof(np.array(content["token_ids"], np.int32), np.array(content["logprobs"], np.float32))


class WeightFolders:
    """The folders of one student's weights, by the optimizer step after which they were taken."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, step: int) -> Path:
        """Return the folder of the weights after a step."""
        return self._folder / f"step-{step:08d}"

    def is_there(self, step: int) -> bool:
        """Whether the weights after a step are there."""
        return self.path(step).is_dir()

    def wait_for(self, step: int, seconds: float) -> bool:
        """Wait some time for the weights after a step; return whether they are there."""
        until = time.monotonic() + seconds
        while not self.is_there(step):
            if time.monotonic() > until:
                return False
            time.sleep(min(0.02, seconds))
        return True

    def newest(self) -> int:
        """Return after which step the newest weights that are there were taken; 0 where there are none."""
        return max(self._steps(), default=0)

    def discard_before(self, step: int) -> None:
        """Remove the weights of earlier steps."""
        for there in self._steps():
            if there < step:
                shutil.rmtree(self.path(there), ignore_errors=True)

    def _steps(self) -> list[int]:
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.glob("step-*"))
        return [int(name[1]) for name in names if name]
