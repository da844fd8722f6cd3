"""Models that the configuration names by an address in object storage: their copies on the driver's node."""

import logging
import time
from functools import cache
from pathlib import Path

from actors.model_cache.object_storage import StoredModelFiles, copied_from, copy_folder, look_up
from orchestrator.cluster.logs import ProgressSnapshot
from orchestrator.cluster.progress import logged_progress

logger = logging.getLogger("atkd")

PROGRESS_SECONDS = 5.0

_described: set[str] = set()
"""Addresses of models whose weights this process does not load."""


def stored_model(address: str, key: str) -> Path:
    """Return the folder of this node's copy of a model, which is made if it is not there; ``key`` names the model's key.

    Raises:
        ValueError: naming the key, if the model cannot be copied.
    """
    folder = copy_folder(address)
    if copied_from(folder) is None and address not in _described:
        renew(address, key)
    return folder


@cache
def renew(address: str, key: str, weights: bool = True) -> None:
    """Make this node's copy of a model the model as it is now; once in the life of a process, which then knows one model.

    Args:
        address: of the model.
        key: that names it.
        weights: whether they are copied too; without them the copy can be described, and not loaded.

    Raises:
        ValueError: naming the key, if the model cannot be copied.
    """
    folder, started = copy_folder(address), time.monotonic()
    try:
        model = look_up(address)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} {address}: {error}") from error
    if not weights:
        _described.add(address)
    files = StoredModelFiles(model, str(folder), weights)
    if files.are_here():
        return
    coming = files.to_come()

    def look() -> ProgressSnapshot:
        came = files.progress()[0]
        line = f"{key}: {came / 1e9:.1f} of {coming / 1e9:.1f} GB copied, {time.monotonic() - started:.0f} s"
        return ProgressSnapshot(came, line, came, max(coming, 1))

    logger.info(f"{key}: copying {coming / 1e9:.2f} GB from {address} to {folder}")
    with logged_progress(key, look, PROGRESS_SECONDS):
        came = files.fetch()
    if isinstance(came, str):
        raise ValueError(f"{key} {address} cannot be copied: {came}")
