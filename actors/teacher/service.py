"""Scores on demand: any worker asks for rows and gets the teacher's scores of them, whatever becomes of single replicas."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.records import Example, TeacherScores
from actors.teacher.replica_set import POLL_SECONDS, Replica, Replicas, TeacherFailed
from actors.teacher.router import LostReplica, RouterHandle, RouterLimits, RowFailed, ScoreRouter

MOST_CALLERS = 1000
"""Calls that wait in the router at one time; more wait outside."""


@contextmanager
def serve(replicas: Replicas, limits: RouterLimits) -> Iterator["ScoreService"]:
    """Put replicas behind a router while the body runs, and start others in the place of those that die."""
    router = ray.remote(ScoreRouter).options(num_cpus=0, max_concurrency=MOST_CALLERS).remote(limits)
    over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(replicas, router, over), name="score service", daemon=True)
    keeper.start()
    try:
        yield ScoreService(router)
    finally:
        over.set()
        keeper.join()
        ray.kill(router)


def _keep(replicas: Replicas, router: RouterHandle, over: threading.Event) -> None:
    serving: dict[int, Replica] = {}
    lost = router.next_lost.remote()
    try:
        while not over.is_set():
            for replica in replicas:
                if not replica.starting and serving.get(replica.number) is not replica:
                    ray.get(router.put_replica.remote(replica.number, replica.actor))
                    serving[replica.number] = replica
            starting = {replica.starting: replica for replica in replicas if replica.starting}
            done, _ = ray.wait([lost, *starting], num_returns=1, timeout=POLL_SECONDS)
            for ref in done:
                if ref in starting:
                    replicas.note_started(starting[ref])
                    continue
                told: LostReplica = ray.get(lost)
                lost, replica = router.next_lost.remote(), serving[told.number]
                replica.deaths = 0 if told.answered else replica.deaths
                replicas.replace(replica, told.error)
            replicas.check_starts()
    except TeacherFailed as error:
        ray.get(router.give_up.remote(str(error)))


@dataclass(frozen=True, slots=True)
class ScoreService:
    """What a caller holds: it can be sent to any task or actor of the same Ray."""

    router: RouterHandle
    """Handle of the ``ScoreRouter``."""

    def score(self, examples: Sequence[Example], timeout_seconds: float = 600.0) -> dict[str, TeacherScores]:
        """Return the scores of rows by their keys; waits while too many rows are asked for already.

        Raises:
            ValueError: naming a row that the teacher cannot take.
            RowFailed: naming the row that cannot be scored, or saying why no row can be any more.
            TimeoutError: if the scores are not there in time.
        """
        try:
            references = ray.get(self.router.score.remote(list(examples)), timeout=timeout_seconds)
            return _by_key(examples, ray.get(references, timeout=timeout_seconds))
        except GetTimeoutError as error:
            raise _late(len(examples), timeout_seconds) from error
        except (RayTaskError, RayActorError) as error:
            raise _plain(error) from error

    async def score_async(self, examples: Sequence[Example], timeout_seconds: float = 600.0) -> dict[str, TeacherScores]:
        """As ``score``, without blocking the caller's event loop."""
        try:
            async with asyncio.timeout(timeout_seconds):
                references = await self.router.score.remote(list(examples))
                return _by_key(examples, await asyncio.gather(*references))
        except TimeoutError as error:
            raise _late(len(examples), timeout_seconds) from error
        except (RayTaskError, RayActorError) as error:
            raise _plain(error) from error


def _by_key(examples: Sequence[Example], scores: Sequence[TeacherScores]) -> dict[str, TeacherScores]:
    found = {score.key: score for score in scores}
    assert set(found) == {example.key for example in examples}, "replicas answer for the rows they were given"
    return found


def _late(rows: int, seconds: float) -> TimeoutError:
    return TimeoutError(
        f"the scores of {rows} rows did not come within {seconds:.0f} s; ask for fewer at once, or wait longer if the teacher "
        "is slow"
    )


def _plain(error: RayTaskError | RayActorError) -> Exception:
    """Return what was raised over there, without Ray's wrapping."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, (RowFailed, ValueError)):
        return error.cause
    return RowFailed(f"the score service is gone: {type(error).__name__}: {error}")
