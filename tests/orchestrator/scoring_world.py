"""A teacher's scores without a teacher: the configuration they belong to, their identity, and a store that is filled."""

from pathlib import Path
from typing import Any

from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.records import Example
from actors.score_store.store import ScoreStore
from orchestrator.config.run import RunConfig
from orchestrator.run.score_identity import store_identity
from tests.fakes import FAKE_VOCAB, expected_scores

ROWS, TOP_K = 10, 5


def run_config(tmp_path: Path, engine: dict[str, Any] | None = None, **scores: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "output": str(tmp_path / "runs"),
            "teacher": {"model": {"kind": "pretrained", "name": "teacher"}, "engine": {"kind": "transformers", **(engine or {})}},
            "student": {"model": {"kind": "pretrained", "name": "student"}},
            "scores": {"top_k": TOP_K, "rows_per_shard": 4, **scores},
        }
    )


def identity_of(config: RunConfig, teacher: ModelSource, examples_path: Path) -> dict[str, Any]:
    return store_identity(config, teacher, "tokens", ExampleFile(examples_path), FAKE_VOCAB, FAKE_VOCAB)


def fill(store: ScoreStore, examples: list[Example]) -> None:
    for shard in store.missing_shards():
        rows = [examples[position] for position in store.positions(shard)]
        store.write_shard(shard, rows, [expected_scores(row, store.top_k) for row in rows])
