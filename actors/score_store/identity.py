"""What a set of scores depends on, in plain fields; two sets are the same when, and only when, these are."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Identity = Mapping[str, Any]
"""Plain, nested fields that together say what the scores mean: teacher, tokenizer, examples, K, engine."""

OPAQUE = {
    "exact": "one keeps log-probabilities in float32, the other rounds them",
    "examples.hash": "other rows or another order of them, another prompt or chat template, or another cut into tokens",
    "teacher.weights_sha256": "other weights",
    "tokenizer": "other ids for the tokens",
}
"""What it means that fields differ whose values tell a person nothing."""


class StoreMismatch(ValueError):
    """A store holds scores of another identity."""


def identity_hash(identity: Identity) -> str:
    """Return 64 hex digits over the identity's canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def identity_difference(wanted: Identity, found: Identity, prefix: str = "") -> list[str]:
    """Return a line for each field that differs: ``engine.dtype: wanted 'float32', the store has 'bfloat16'``."""
    lines = []
    for name in sorted({*wanted, *found}):
        ours, theirs = wanted.get(name), found.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            lines += identity_difference(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            meaning = f" ({OPAQUE[prefix + name]})" if prefix + name in OPAQUE else ""
            lines.append(f"{prefix}{name}: wanted {ours!r}, the store has {theirs!r}{meaning}")
    return lines
