"""What a command logs: on a terminal, elsewhere, and in the run's folder."""

import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.logs import (
    ProgressSnapshot,
    close_log_file,
    console_logging,
    log_progress,
    open_log_file,
    prefixed,
)
from tests.logs import logged

logger = logging.getLogger("atkd")


def some_lines() -> None:
    logger.debug("an event")
    logger.info("prepare: 100 % [done]")
    log_progress(ProgressSnapshot(1, "train: step 1/4", 1, 4), "train")
    log_progress(ProgressSnapshot(1, "train: step 1/4", 1, 4), "train", over=True)
    logger.warning("a replica died")


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        (logging.INFO, ["prepare: 100 % [done]", "train: step 1/4"]),
        (logging.WARNING, []),
        (logging.DEBUG, ["debug: an event", "prepare: 100 % [done]", "train: step 1/4"]),
    ],
)
def test_lines_have_their_seconds_and_warnings_go_to_standard_error(
    level: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with console_logging(level):
        some_lines()
    logger.warning("after it")
    printed = capsys.readouterr()
    found = [re.fullmatch(r"\[ +\d+\.\d s\] (.*)", line) for line in printed.out.splitlines()]
    assert [match and match[1] for match in found] == lines
    (warning,) = printed.err.splitlines()
    assert re.fullmatch(r"\[ +\d+\.\d s\] warning: a replica died", warning)


def test_the_file_holds_the_lines_whatever_the_terminal_shows_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-private-value")
    for _ in range(2):  # a run that is resumed goes on in the same file
        handler = open_log_file(tmp_path)
        with console_logging(logging.WARNING), prefixed("large"):
            some_lines()
            logger.info("token very-private-value")
        close_log_file(handler)
    logger.warning("not of this run")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.partition("Z ")[2] for line in lines] == 2 * [
        "INFO large: prepare: 100 % [done]", "INFO large: train: step 1/4", "WARNING large: a replica died",
        "INFO large: token (hidden)",
    ]  # fmt: skip
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_does_not_stop_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.log").symlink_to("/dev/full")
    handler = open_log_file(tmp_path)
    with logged() as lines:
        logger.info("goes on")
    close_log_file(handler)
    assert lines == ["goes on"] and capsys.readouterr().err == ""


def test_prefixes_end_with_their_body() -> None:
    with logged() as lines:
        with prefixed("large"), prefixed("score"):
            logger.info("one")
        logger.info("two")
    assert lines == ["score: large: one", "two"] or lines == ["large: score: one", "two"]


def test_a_terminal_shows_a_bar_and_is_left_with_the_lines_alone() -> None:
    code = (
        "import time\n"
        "from orchestrator.cluster.logs import *\n"
        "with console_logging():\n"
        "    logger.info('first [line]')\n"
        "    for step in range(1, 5):\n"
        "        log_progress(ProgressSnapshot(step, f'train: step {step}/4', step, 4), 'train')\n"
        "        time.sleep(0.15)\n"
        "    log_progress(ProgressSnapshot(4, '', 4, 4), 'train', over=True)\n"
        "    logger.info('last line')\n"
    )
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=theirs, stderr=subprocess.PIPE, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert done.returncode == 0 and done.stderr == b""
    text = shown.decode()
    assert "━" in text and "50 %" in text and "train: step 2/4" in text
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text).splitlines() if "line" in line]
    assert [line.partition("] ")[2] for line in lines] == ["first [line]", "last line"]
    assert "\x1b[?25h" in text, "the cursor is shown again"
