"""The scoring stage: what a run looks at before its first shard; whose error is heard where teacher and student run at once."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from actors.engines.base import EngineFactory
from actors.engines.build import build_engine
from actors.score_store.store import ScoreStore
from actors.teacher.replica_set import TeacherFailed
from orchestrator.models.models import Models
from orchestrator.run.evaluation import teacher_by_scores
from orchestrator.run.run_dir import RunDir
from orchestrator.run.scoring import ScoringStage
from tests.faulty_engines import DiesOnce, Serves, ShiftedEngine
from tests.logs import logged
from tests.orchestrator.trial_world import config_in, unscored_run
from tests.worlds import VOCAB, tiny_llama


class Pool:
    """Stands for a pool whose work ends when it is closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Stage(ScoringStage):
    """A stage that scores for some seconds, and may fail at the end; it opens no store."""

    def __init__(self, seconds: float, error: Exception | None = None) -> None:
        self._pool = Pool()  # type: ignore[assignment]
        self._seconds, self._error = seconds, error
        self.training_store = None
        self.finished = False

    def run(self) -> None:
        if self._pool.closed.wait(self._seconds):  # type: ignore[union-attr]
            raise RuntimeError("the teacher pool was closed while it was in use")
        if self._error is not None:
            raise self._error
        self.finished = True


def test_the_body_waits_for_the_scoring_to_end() -> None:
    stage = Stage(seconds=0.3)
    with stage.in_background():
        assert not stage.finished
    assert stage.finished


def test_the_teachers_error_is_heard_when_the_body_is_done() -> None:
    with pytest.raises(OSError, match="disk is full"), Stage(0.1, OSError("disk is full")).in_background():
        pass


def test_the_teachers_error_goes_before_that_of_the_student_who_followed_it() -> None:
    with pytest.raises(OSError, match="disk is full"), Stage(0.3, OSError("disk is full")).in_background():
        raise RuntimeError("ScoringFailed: disk is full")


def test_an_error_of_the_students_own_ends_the_teachers_work() -> None:
    stage = Stage(seconds=60)
    with pytest.raises(RuntimeError, match="the student diverged"), stage.in_background():
        raise RuntimeError("the student diverged")
    assert not stage.finished and stage._pool.closed.is_set()  # type: ignore[union-attr]


# ---- before the first shard


def score(
    folder: Path, engine_factory: EngineFactory = build_engine, **scores: int
) -> tuple[list[str], list[dict[str, object]]]:
    """Score a run; return what it said, and its events."""
    config = unscored_run(folder, scores={"top_k": 8, "rows_per_shard": 8, **scores})
    with logged() as said, RunDir.open(config) as run_dir:
        stage = ScoringStage(config, run_dir, Models(config, run_dir.path), engine_factory)
        stage.run()
        events = [json.loads(line) for line in (run_dir.path / "events.jsonl").read_text().splitlines()]
    return said, events


@pytest.mark.ray
def test_served_scores_are_compared_with_a_forward_pass_and_the_run_says_how_near_they_are(
    local_ray: None, tmp_path: Path
) -> None:
    said, events = score(tmp_path)
    (line,) = [line for line in said if "differ from a plain forward pass by" in line]
    (compared,) = [event for event in events if event["event"] == "compared"]
    assert f"{compared['targets']} targets differ" in line
    assert compared["rows"] == 4 and compared["left_out"] == ""
    assert 0 < compared["largest_target_error"] < 1e-4 and compared["topk_agreement"] > 0.99  # type: ignore[operator]


@pytest.mark.ray
def test_a_run_that_wants_no_comparison_says_that_there_is_none(local_ray: None, tmp_path: Path) -> None:
    said, events = score(tmp_path, compare_rows=0)
    assert any(line.endswith("scores are not compared with a plain forward pass: scores.compare_rows is 0") for line in said)
    assert not [event for event in events if event["event"] == "compared"]
    (not_compared,) = [event for event in events if event["event"] == "not_compared"]
    assert not_compared["reason"] == "scores.compare_rows is 0"


@pytest.mark.ray
def test_a_replica_that_dies_is_in_the_books(local_ray: None, tmp_path: Path) -> None:
    _, events = score(tmp_path, DiesOnce(tmp_path / "died"), compare_rows=0)
    (died,) = [event for event in events if event["event"] == "replica_died"]
    assert died["replica"] == 0 and "actor died" in str(died["error"])
    assert events[-1]["event"] == "stage_finished"


@pytest.mark.ray
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shifted", r"FAILED served: .* by at most .* \(may 0.001\), furthest in row \d+, .* one position after the right one"),
        ("another", r"FAILED served: .* serves another model than teacher.model"),
    ],
)
def test_a_run_stops_before_the_first_shard_of_a_teacher_that_serves_other_scores(
    local_ray: None, tmp_path: Path, fault: str, message: str
) -> None:
    another = Serves(tiny_llama(tmp_path / "another", seed=9))
    with pytest.raises(TeacherFailed, match=rf"the scores would not be the teacher's own\. {message}"):
        score(tmp_path, {"shifted": ShiftedEngine, "another": another}[fault])
    stores = list((tmp_path / "runs" / "scores").iterdir())
    assert len(stores) == 2 and not [path for store in stores for path in store.glob("shard-*")]


@pytest.mark.ray
def test_tokens_beyond_the_tokenizer_are_never_named(local_ray: None, tmp_path: Path) -> None:
    """As of Qwen2.5: heads are padded, of larger models further, and the untrained rows have probability."""
    teacher = LlamaForCausalLM.from_pretrained(tiny_llama(tmp_path / "teacher", seed=1))
    teacher.resize_token_embeddings(VOCAB + 28)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[VOCAB:] = 3 * teacher.get_output_embeddings().weight[:28]
    teacher.save_pretrained(tmp_path / "teacher")
    score(tmp_path)
    stores = json.loads((config_in(tmp_path).run_dir / "scores.json").read_text())
    for store in (ScoreStore(path) for path in stores.values()):
        assert (store.identity["vocab_size"], store.identity["ids_below"]) == (VOCAB + 28, VOCAB)
        scores = [store.scores_at(position) for position in range(store.rows)]
        assert max(int(one.topk_ids.max()) for one in scores) < VOCAB
        largest_tails = max(float(np.exp(one.tail_logmass - one.topk_logprobs[:, 0]).max()) for one in scores)
        assert largest_tails > 1, "what would have been the likeliest token is in the tail"


@pytest.mark.ray
def test_neighbours_of_tokens_are_scored_like_any_teacher_and_measured_by_their_scores(local_ray: None, tmp_path: Path) -> None:
    similar = {"teacher": {"similar_tokens": {"smoothing": 0.2}}, "evaluate": {"teacher": "scores"}, "loss": {"kind": "coupled"}}
    config = unscored_run(tmp_path, scores={"top_k": 8, "rows_per_shard": 8}, **similar)
    with logged() as said, RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        stage = ScoringStage(config, run_dir, models)
        stage.run()
        source = models.ready("teacher")
        measured = teacher_by_scores(config, run_dir.path, source, stage.heldout_store).metrics
    assert any(line.endswith("plain forward pass: neighbours of tokens are taught, and no predictions") for line in said)
    assert measured.heldout_loss == pytest.approx(-math.log(0.8), abs=1e-5) and measured.top1_agreement == 1
    assert stage.training_store is not None and stage.training_store.identity["similar_tokens"] == {
        "smoothing": 0.2, "temperature": 0.1,
    }  # fmt: skip
    plain = unscored_run(tmp_path / "plain")
    with RunDir.open(plain) as run_dir:
        assert "similar_tokens" not in ScoringStage(plain, run_dir, Models(plain, run_dir.path)).heldout_store.identity
