"""What a failure means to the user."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from actors.rollouts.sampling_actors import WritingFailed
from actors.score_store.identity import StoreMismatch
from actors.teacher.replica_set import TeacherFailed
from orchestrator.cluster import signals as sigterm
from orchestrator.cluster.ray_session import RayFailed
from orchestrator.config.load import load_config
from orchestrator.error_log import write_traceback, write_traceback_elsewhere
from orchestrator.failure import Verdict, classify, guarded
from orchestrator.run.run_dir import RunDirError
from orchestrator.run.training import TrainingFailed


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "/store/shard-00001.arrow")


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes where it stopped"),
        (ValueError("loss.easy_ratio 3"), 2, "loss.easy_ratio 3"),
        (StoreMismatch("other scores"), 2, "other scores"),
        (RayTaskError("score", "trace", ValueError("row 7 is wrong")), 2, "row 7 is wrong"),
        (TeacherFailed("the teacher failed on shard 3"), 1, "the teacher failed on shard 3"),
        (WritingFailed("a writer of responses died"), 1, "a writer of responses died"),
        (TrainingFailed("train: worker 0 failed"), 1, "train: worker 0 failed"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (
            FULL,
            1,
            "the disk is full ([Errno 28] No space left on device: '/store/shard-00001.arrow'): make room; the same command",
        ),
        (
            raised_from(TeacherFailed("the teacher failed"), RayTaskError("score", "trace", FULL)),
            1,
            "the disk is full ([Errno 28]",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_each_failure_has_an_exit_code_and_a_few_words(error: BaseException, exit_code: int, message: str) -> None:
    verdict = classify(error)
    assert verdict.exit_code == exit_code
    assert verdict.message.startswith(message)


def test_the_whole_story_is_kept_where_that_is_possible(tmp_path: Path) -> None:
    try:
        raise KeyError("x")
    except KeyError as error:
        path = write_traceback(tmp_path, error)
        assert path == tmp_path / "error.log" and "KeyError: 'x'" in path.read_text()
        (tmp_path / "file").write_text("")
        assert write_traceback(tmp_path / "file", error) is None
        elsewhere = write_traceback_elsewhere(error)
        assert elsewhere is not None and "KeyError: 'x'" in elsewhere.read_text() and elsewhere.stat().st_mode & 0o077 == 0
        elsewhere.unlink()
    assert isinstance(classify(KeyError("x")), Verdict)


def raising(error: Exception) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def test_no_folder_is_made_to_keep_an_error_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("configs/tiny_cpu.yaml", [f"output={tmp_path / 'runs'}"])
    assert guarded(config, raising(ValueError("data.source.path names nothing"))) == 2
    assert capsys.readouterr().err == "error: data.source.path names nothing\n"
    assert guarded(config, raising(RayFailed("Ray cannot be started"))) == 1
    assert capsys.readouterr().err == "error: Ray cannot be started\n"
    assert not (tmp_path / "runs").exists()


def test_an_error_that_says_little_is_kept_somewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("configs/tiny_cpu.yaml", [f"output={tmp_path}"])
    assert guarded(config, raising(KeyError("x"))) == 1
    said, kept = capsys.readouterr().err.splitlines()
    log = Path(kept.removeprefix("the traceback is in "))
    assert said == "error: KeyError: 'x'" and log.suffix == ".log" and "KeyError: 'x'" in log.read_text()
    log.unlink()
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text("")
    assert guarded(config, raising(KeyError("x"))) == 1
    assert capsys.readouterr().err.endswith(f"the traceback is in {config.run_dir / 'error.log'}\n")
    (config.run_dir / "error.log").unlink()
    assert guarded(config, raising(ValueError("no")), of_the_run=False) == 2  # a plan is not the run
    assert guarded(config, raising(RunDirError("another process works there"))) == 2
    assert not (config.run_dir / "error.log").exists()


def test_sigterm_ends_a_command_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    given_back = []

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            given_back.append(True)
        return 0

    try:
        assert guarded(load_config("configs/tiny_cpu.yaml", [f"output={tmp_path}"]), work) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert given_back == [True]
    assert "error: terminated; the same command resumes where it stopped" in capsys.readouterr().err


def test_sigterm_does_what_ctrl_c_would_and_is_told_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, before = load_config("configs/tiny_cpu.yaml", [f"output={tmp_path}"]), (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in before]
    called = []

    def as_ray_train_does(number: int, frame: object) -> None:
        called.append(number)
        sys.exit(0)

    def terminated() -> int:
        signal.signal(signal.SIGINT, as_ray_train_does)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except SystemExit:
            raise TrainingFailed("train: its workers are gone") from None
        return 0

    def failed() -> int:
        raise TrainingFailed("train: worker 0 failed")

    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text("")
    try:
        assert guarded(config, terminated) == 143
        assert guarded(config, failed) == 1  # another command of this process has not been terminated
    finally:
        for number, handler in zip(before, handlers, strict=True):
            signal.signal(number, handler)
    assert called == [signal.SIGINT]
    log = f"the traceback is in {config.run_dir / 'error.log'}"
    assert capsys.readouterr().err.splitlines() == [
        "error: terminated; the same command resumes where it stopped", log, "error: train: worker 0 failed", log,
    ]  # fmt: skip


def test_our_handling_of_sigterm_outlives_whoever_sets_another() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with sigterm.listening_on():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # nobody asked for ours
        with pytest.raises(SystemExit), sigterm.listening_on():
            sys.exit(3)
        sigterm.listen()
        ours = signal.getsignal(signal.SIGTERM)
        with sigterm.listening_on():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is ours and not sigterm.received()
        with pytest.raises(KeyboardInterrupt), sigterm.listening_on():
            sys.exit(signal.SIGTERM)  # by Ray's handler, while Ray starts
        assert signal.getsignal(signal.SIGTERM) is ours and sigterm.received()
    finally:
        signal.signal(signal.SIGTERM, before)
