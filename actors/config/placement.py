"""What the user may say about how many replicas there are, and on which nodes replicas and workers stand."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

OWN_KEYS = {"CPU": "cpus", "GPU": "gpu or gpus"}
"""Ray's own resources, and the key that a section has for each."""
LABEL_VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
LABEL_SELECTOR = re.compile(rf"!?(?:{LABEL_VALUE}|in\({LABEL_VALUE}(?:, ?{LABEL_VALUE})*\))")


def _require_replicas(replicas: object) -> object:
    if replicas != "auto" and (not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 1):
        raise ValueError(f"{replicas!r} is no number of replicas; 1 or auto would do")
    return replicas


def _require_custom(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in OWN_KEYS:
            raise ValueError(f"{name} is no custom resource; {OWN_KEYS[name]}, beside resources, is the key for it")
        if amount <= 0:
            raise ValueError(f"{name} {amount:g} asks for nothing; {name} 1 would do")
    return resources


def _require_selectors(labels: dict[str, str]) -> dict[str, str]:
    for name, selector in labels.items():
        if not LABEL_SELECTOR.fullmatch(selector):
            raise ValueError(f"{name} {selector!r} selects no label; 'teacher', '!teacher' or 'in(teacher, both)' would do")
    return labels


Replicas = Annotated[int | Literal["auto"], BeforeValidator(_require_replicas)]
CustomResources = Annotated[dict[str, float], AfterValidator(_require_custom)]
NodeLabels = Annotated[dict[str, str], AfterValidator(_require_selectors)]
