"""Several nodes: who stands where, and what is scored after a node is lost with a replica on it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from actors.score_store.store import ScoreStore
from actors.teacher.pool import WINDOW
from tests.actors.fake_cluster_world import ROWS
from tests.fakes import assert_complete, fake_examples
from tests.recovery import Record, record_recovery

ROOT = Path(__file__).parents[2]


@pytest.mark.drill
@pytest.mark.ray
@pytest.mark.slow
def test_scoring_goes_on_elsewhere_when_a_node_is_lost(tmp_path: Path, record_property: Record) -> None:
    command = [sys.executable, "-m", "tests.actors.fake_cluster_world", str(tmp_path)]
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:  # AF_UNIX paths are limited to about 107 bytes
        environment = os.environ | {"RAY_TMPDIR": short, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    facts = json.loads((tmp_path / "facts.json").read_text())

    assert facts["students"] == ["c"] * 4
    assert len(facts["replicas"]) == 2 and set(facts["replicas"]) <= {"a", "b"}
    assert facts["auto"] == "4 replicas of 4 GPUs and 1 CPU, as many as find room on 2 nodes beside 4 workers"
    assert facts["auto_beside"].startswith("2 replicas of 4 GPUs and 1 CPU, as many as find room on ")

    lost = facts["replicas"].count(facts["replicas"][0])
    remaining = ({"a", "b"} - {facts["replicas"][0]}).pop()
    assert facts["missing_when_lost"] > 0
    record_recovery(record_property, facts["recovery_seconds"])  # until an engine stands in the place of the lost one
    assert "teacher replica " in done.stderr and " died: Actor" in done.stderr
    assert facts["replicas_after_loss"] == [remaining] * 2
    assert all(gpus == 4 for _, gpus in facts["engines"])
    assert facts["shards_redone"] <= WINDOW * lost
    assert facts["rooms_left"] == 0
    assert_complete(ScoreStore(tmp_path / "store"), fake_examples(ROWS))
