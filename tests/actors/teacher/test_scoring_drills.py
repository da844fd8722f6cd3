"""A machine that goes down, and Ctrl-C, while a store is scored: started again, the work is finished and nothing done twice."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from actors.score_store.store import LEFTOVER_SECONDS, ScoreStore
from actors.teacher.pool import WINDOW
from tests.actors.scoring_driver import TOP_K
from tests.fakes import assert_complete, fake_examples, fake_store, record_next_shard
from tests.recovery import Record

ROOT = Path(__file__).parents[3]
ROWS, ROWS_PER_SHARD, REPLICAS = 64, 4, 2

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.drill]


def driver(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "tests.actors.scoring_driver", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_shards(victim: subprocess.Popen[str], store: ScoreStore, count: int) -> None:
    until = time.monotonic() + 120
    while store.shard_count - len(store.missing_shards()) < count and time.monotonic() < until and victim.poll() is None:
        time.sleep(0.02)
    assert victim.poll() is None and store.missing_shards(), "it ended before it could be stopped"


def test_a_driver_that_is_killed_or_interrupted_goes_on_where_it_stopped(tmp_path: Path, record_property: Record) -> None:
    examples = fake_examples(ROWS)
    _, store = fake_store(tmp_path, examples, ROWS_PER_SHARD, TOP_K)

    killed = driver(tmp_path)
    wait_for_shards(killed, store, 2)
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:  # as when the machine goes down
        with suppress(psutil.NoSuchProcess):
            process.kill()
    killed.communicate()
    harmed = tmp_path / "harmed"
    harmed.touch()
    finished = {path.name: path.stat().st_mtime_ns for path in Path(store.place).glob("shard-*.json")}

    interrupted = driver(tmp_path)
    wait_for_shards(interrupted, store, len(finished) + 2)
    record_next_shard(record_property, harmed, store)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate(timeout=60)
    assert interrupted.returncode != 0 and "KeyboardInterrupt" in errors

    last = driver(tmp_path)
    assert last.wait(timeout=120) == 0, last.stderr and last.stderr.read()
    assert_complete(store, examples)
    assert {name: (Path(store.place) / name).stat().st_mtime_ns for name in finished} == finished  # not written again
    times_scored = Counter((tmp_path / "scored").read_text().split())
    redone = sum(times - 1 for times in times_scored.values())
    assert redone <= 2 * REPLICAS * WINDOW * ROWS_PER_SHARD  # for each of two ends, what the replicas held
    for cut_short in Path(store.place).glob("*.tmp"):  # by a kill in the middle of a write; it goes once it is an hour old
        os.utime(cut_short, (time.time() - 2 * LEFTOVER_SECONDS,) * 2)
    store.remove_leftovers()
    assert not list(Path(store.place).glob("*.tmp"))
    assert_complete(store, examples)
