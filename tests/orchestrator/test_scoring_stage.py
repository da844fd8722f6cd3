"""Teacher and student side by side: whose error is heard."""

import threading

import pytest

from orchestrator.scoring_stage import ScoringStage


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
