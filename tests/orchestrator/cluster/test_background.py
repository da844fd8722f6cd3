"""Work beside the driver's own: neither outlives the other, and the first error is the one that is raised."""

import threading

import pytest

from orchestrator.cluster import background
from orchestrator.cluster.background import in_background

PATIENCE_SECONDS = 60.0
NAME = "work-of-a-test"


class Work:
    """Goes on until it is told that it is over, then fails if it is to."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.began, self.over, self.ended = threading.Event(), threading.Event(), False
        self.thread = ""
        self._error = error

    def __call__(self) -> None:
        self.thread = threading.current_thread().name
        self.began.set()
        assert self.over.wait(PATIENCE_SECONDS)
        self.ended = True
        if self._error is not None:
            raise self._error


def fail(error: BaseException) -> None:
    raise error


def assert_no_thread() -> None:
    assert NAME not in [thread.name for thread in threading.enumerate()]


def test_work_and_body_both_end() -> None:
    work, stopped = Work(), []
    with in_background(NAME, work, lambda: stopped.append(True)):
        assert work.began.wait(PATIENCE_SECONDS)
        assert not work.ended
        work.over.set()
    assert work.ended and work.thread == NAME
    assert not stopped, "what ends by itself is not stopped"
    assert_no_thread()


def test_a_body_that_is_done_waits_for_the_work() -> None:
    work = Work()
    later = threading.Timer(0.1, work.over.set)
    with in_background(NAME, work, work.over.set):
        later.start()
    assert work.ended
    later.join()
    assert_no_thread()


def test_an_error_of_the_work_is_raised_after_a_body_that_ended_well() -> None:
    work, body = Work(ValueError("no teacher")), []
    with pytest.raises(ValueError, match="^no teacher$"), in_background(NAME, work, work.over.set):
        work.over.set()
        body.append("done")
    assert body == ["done"]
    assert_no_thread()


def test_an_error_of_the_work_goes_before_one_of_the_body() -> None:
    work = Work(ValueError("no teacher"))

    def body() -> None:
        work.over.set()
        raise TimeoutError("no rows")

    with pytest.raises(ValueError, match="^no teacher$") as caught, in_background(NAME, work, lambda: None):
        body()
    assert caught.value.__suppress_context__, "the body's is what follows from it"
    assert_no_thread()


def test_work_that_is_about_to_fail_is_given_time_to_say_why() -> None:
    work = Work(ValueError("no teacher"))
    later = threading.Timer(0.1, work.over.set)
    with pytest.raises(ValueError, match="^no teacher$"), in_background(NAME, work, lambda: None):
        later.start()
        fail(TimeoutError("no rows"))
    later.join()


def test_an_error_of_the_body_stops_the_work_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "GRACE_SECONDS", 0.05)
    work = Work()
    with pytest.raises(TimeoutError, match="^no rows$"), in_background(NAME, work, work.over.set):
        assert work.began.wait(PATIENCE_SECONDS)
        fail(TimeoutError("no rows"))
    assert work.ended
    assert_no_thread()


def test_work_that_fails_because_it_was_stopped_does_not_hide_the_error_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "GRACE_SECONDS", 0.05)
    work = Work(RuntimeError("stopped in the middle"))
    with pytest.raises(TimeoutError, match="^no rows$"), in_background(NAME, work, work.over.set):
        fail(TimeoutError("no rows"))
    assert work.ended


def test_an_interrupted_body_stops_the_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "GRACE_SECONDS", 10 * PATIENCE_SECONDS)  # the work would give up before
    work = Work()
    with pytest.raises(KeyboardInterrupt), in_background(NAME, work, work.over.set):
        fail(KeyboardInterrupt())
    assert work.ended
    assert_no_thread()


def test_an_interrupt_after_the_work_has_failed_is_told_what_the_work_said() -> None:
    def work() -> None:
        raise ValueError("no teacher")

    with pytest.raises(ValueError, match="^no teacher$"), in_background(NAME, work, lambda: None):
        for thread in threading.enumerate():
            if thread.name == NAME:
                thread.join(PATIENCE_SECONDS)
        fail(KeyboardInterrupt())
