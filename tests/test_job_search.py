"""``score`` and ``compare`` by ``ray job submit``: one is done before the other, which is stopped, submitted again and ends."""

import json
from pathlib import Path

import pytest

from orchestrator.search.ledger import read_ledger
from tests.ray_heads import head, wait_until
from tests.recovery import Record, record_until
from tests.test_job_submission import RAYS_OWN, assert_readable, small_run

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.drill]


@pytest.mark.parametrize(("trials_in", "trials"), [("reused_process", 40), ("ray_train", 4)])
def test_a_submitted_comparison_is_stopped_and_submitted_again_and_ends(
    tmp_path: Path, trials_in: str, trials: int, record_property: Record
) -> None:
    """As many trials as outlast the stop: one of the first kind takes a second, one of the other half a minute."""
    path = small_run(tmp_path)
    config = json.loads(path.read_text())
    config["compare"] = {
        "arms": ["forward_kl", "cross_entropy"], "seeds": trials // 2, "rungs": 2, "trials_in": trials_in, "concurrent": 1
    }  # fmt: skip
    path.write_text(json.dumps(config))
    folder = tmp_path / "runs" / "small" / "compare"
    ledger = folder / "ledger.jsonl"

    def over() -> int:
        return len(read_ledger(ledger).with_status("completed")) if ledger.exists() else 0

    with head(RAY_AUTH_MODE="disabled") as cluster:
        variables = {
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_JOB_STOP_WAIT_TIME_S": "120", "RAY_API_SERVER_ADDRESS": cluster.url,
        }  # fmt: skip
        scoring = cluster.submit("score", "score", str(path), **variables)
        output, _ = scoring.communicate(timeout=300)
        assert cluster.job("score")["status"] == "SUCCEEDED", output
        assert_readable(cluster.said("score"))

        first = cluster.submit("first", "compare", str(path), **variables)
        wait_until(lambda: over() >= 1, 300, "no trial ends", first)
        cluster.stop("first")
        output, _ = first.communicate(timeout=120)
        assert cluster.job("first")["status"] == "STOPPED", output
        said = cluster.said("first")
        assert said[-2] == "error: terminated; the same command resumes where it stopped"
        assert_readable(said)
        assert any("score: done before" in line for line in said) and any(f"/{trials} trials done, " in line for line in said)
        wait_until(lambda: set(cluster.left()) <= RAYS_OWN, 60, "actors or placement groups are not gone")
        before = {trial.number: trial.ended for trial in read_ledger(ledger).with_status("completed")}
        assert 1 <= len(before) < trials

        second = cluster.submit("second", "compare", str(path), **variables)
        record_until(record_property, lambda: over() > len(before) or second.poll() is not None)
        output, _ = second.communicate(timeout=400)
        assert second.returncode == 0, output
        assert cluster.job("second")["status"] == "SUCCEEDED"
        assert_readable([line for line in cluster.said("second") if line.startswith("[")])
        wait_until(lambda: set(cluster.left()) <= RAYS_OWN, 60, "actors or placement groups are not gone")
    assert f"compare: resumes with {len(before)} trials done" in output
    ended = {trial.number: trial.ended for trial in read_ledger(ledger).with_status("completed")}
    assert len(ended) == trials and {number: ended[number] for number in before} == before
    assert (folder / "report.html").exists()
