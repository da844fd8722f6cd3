"""The arms of a comparison: what a student may be taught by, all else being equal. Imports neither torch nor Ray."""

from typing import Any

from orchestrator.config.compare import ARMS
from orchestrator.config.run import RunConfig


def loss_of(arm: str, config: RunConfig) -> dict[str, Any]:
    """Return the section ``loss`` of an arm; those of ATKD take their knobs from the configuration, if its loss is ATKD."""
    loss = dict(ARMS[arm])
    if loss["kind"] == "atkd" and config.loss.kind == "atkd":
        return {**config.loss.model_dump(mode="json"), "scope": _scope(loss, config), **loss}
    return loss


def _scope(loss: dict[str, Any], config: RunConfig) -> str:
    """Return the configuration's scope, or the one in which a control's other split can be drawn."""
    assert config.loss.kind == "atkd"
    return "batch" if loss["split"] != "uncertainty" and config.loss.scope == "microbatch" else config.loss.scope
