"""The stage that fills a store: what it finds, scores and sums up, and what followers hear when it fails."""

from pathlib import Path

import numpy as np
import pytest

from actors.model_source import ModelSource
from actors.records import Example
from actors.score_store.store import ScoreStore, ScoringFailed
from actors.teacher.pool import TeacherPool
from actors.teacher.replica_set import TeacherFailed
from orchestrator.run.score_identity import ScoringProgress, open_store, score_split
from tests.fakes import FakeTeacher, expected_scores, fake_spec
from tests.orchestrator.scoring_world import TOP_K, fill, identity_of, run_config


@pytest.fixture
def store(tmp_path: Path, teacher: ModelSource, examples_path: Path) -> ScoreStore:
    config = run_config(tmp_path)
    return open_store(config, identity_of(config, teacher, examples_path))


@pytest.mark.ray
def test_the_stage_scores_what_is_missing_and_sums_up(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example]
) -> None:
    progress: list[ScoringProgress] = []
    rows = examples[:4]
    store.write_shard(0, rows, [expected_scores(row, TOP_K) for row in rows])
    store.declare_failed("of an earlier run")
    with TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher()) as pool:
        summary = score_split(pool, examples_path, store, progress.append)
        again = score_split(pool, examples_path, store, progress.append)
    assert store.complete and not (Path(store.place) / "failed.txt").exists()
    assert [(step.shards_done, step.shards_total) for step in progress] == [(2, 3), (3, 3)]
    assert progress[-1].seconds_left == 0 and progress[-1].tokens == summary.tokens
    assert (summary.shards_scored, summary.shards_found) == (2, 1)
    assert summary.tokens == sum(len(example.token_ids) for example in examples[4:])
    assert summary.tokens_per_second == pytest.approx(summary.tokens / summary.seconds)
    assert summary.targets == sum(len(example.targets) for example in examples)
    size = sum(path.stat().st_size for path in Path(store.place).glob("shard-*.[ar]*"))
    assert summary.bytes_per_target == pytest.approx(size / summary.targets)
    tails = np.concatenate([np.exp(expected_scores(example, TOP_K).tail_logmass) for example in examples])
    assert summary.mean_tail_mass == pytest.approx(tails.mean(), abs=1e-6)
    assert (again.tokens, again.shards_scored, again.shards_found, again.tokens_per_second) == (0, 0, 3, 0.0)
    assert again.targets == summary.targets


@pytest.mark.ray
def test_followers_of_a_store_hear_the_teachers_own_error_and_a_later_run_completes(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example]
) -> None:
    with (
        pytest.raises(TeacherFailed, match="failed on shard 1 .*the fake teacher fails on this row"),
        TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(fails_on_key=examples[5].key)) as pool,
    ):
        score_split(pool, examples_path, store, lambda progress: None)
    with pytest.raises(ScoringFailed, match="failed on shard 1 .*the fake teacher fails on this row"):
        ScoreStore(store.place).wait_for(1, timeout_seconds=30)
    with TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher()) as pool:
        summary = score_split(pool, examples_path, store, lambda progress: None)
    assert summary.shards_found + summary.shards_scored == store.shard_count
    for position, example in enumerate(examples):
        assert store.scores_at(position).key == example.key


def test_a_damaged_shard_is_named_and_nothing_is_scored_or_repaired(
    tmp_path: Path, examples_path: Path, store: ScoreStore, examples: list[Example]
) -> None:
    fill(store, examples)
    path = Path(store.place) / "shard-00001.rows"
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    pool = TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher())  # never entered: no replica is needed to find it
    with pytest.raises(ValueError, match="shard-00001.rows is damaged: .*delete shard-00001.json there and run again"):
        score_split(pool, examples_path, store, lambda progress: None)
    assert path.read_bytes() == bytes(content)
    assert "shard-00001.rows is damaged" in (Path(store.place) / "failed.txt").read_text()
    assert store.complete
