"""The teacher pool: replicas as Ray actors, and the driver's loop that hands shards to them.

A replica works on one shard and has a second one waiting; it writes its shards itself and returns counts. Replicas belong to
the driver and die with it.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.score_store import ScoreStore
from actors.teacher import EngineDied, EngineFactory, ShardResult, TeacherReplica, TeacherSpec, build_engine, engine_environment

log = logging.getLogger(__name__)

WINDOW = 2  # shards of one replica: the one it works on and the next
POLL_SECONDS = 1.0
CLOSE_SECONDS = 10.0


class TeacherFailed(RuntimeError):
    """The teacher cannot score, and trying again would not help."""


class ShardQueue:
    """Which shard is next, and how often each was tried. Knows nothing of Ray."""

    def __init__(self, shards: Iterable[int], max_retries: int) -> None:
        self._waiting = deque(shards)
        self._deaths: Counter[int] = Counter()
        self._max_retries = max_retries

    def __len__(self) -> int:
        return len(self._waiting)

    def next(self) -> int:
        """Take the next shard."""
        return self._waiting.popleft()

    def hand_back(self, shards: Iterable[int]) -> None:
        """Put shards that nobody began back in front, in their order."""
        self._waiting.extendleft(reversed(list(shards)))

    def died_on(self, shard: int) -> int | None:
        """Note that a replica died while it worked on a shard; put it back, or return how often if that was too often."""
        self._deaths[shard] += 1
        if self._deaths[shard] > self._max_retries:
            return self._deaths[shard]
        self._waiting.appendleft(shard)
        return None


@dataclass
class _Replica:
    """The driver's view of one replica."""

    number: int
    actor: Any
    starting: ray.ObjectRef | None
    """The result of ``start``, until the engine is there."""
    since: float
    """Monotonic time at which it was started, or at which it took up its oldest shard."""
    deaths: int = 0
    in_flight: dict[ray.ObjectRef, int] = field(default_factory=dict)
    """Result to shard, oldest first."""

    def awaited(self) -> list[ray.ObjectRef]:
        """What is under way here."""
        return [self.starting] if self.starting else list(self.in_flight)


@dataclass(frozen=True)
class _Work:
    """One call's examples, store, and shards that wait."""

    examples_path: Path
    store: ScoreStore
    queue: ShardQueue

    def describe(self, shard: int) -> str:
        positions = self.store.positions(shard)
        return f"shard {shard} (rows {positions[0]} to {positions[-1]} of {self.examples_path.name})"


class TeacherPool:
    """The replicas of one teacher. A context manager; ``score_missing`` may run in any thread, one at a time.

    Args:
        spec: what each replica's engine is built from.
        engine_factory: builds the engine inside the replica; picklable.
        start_timeout_seconds: how long replicas may take until their engines are there.
        shard_timeout_seconds: a replica that works longer than this on one shard counts as dead.
    """

    def __init__(
        self,
        spec: TeacherSpec,
        *,
        engine_factory: EngineFactory = build_engine,
        start_timeout_seconds: float = 600.0,
        shard_timeout_seconds: float = 3600.0,
    ) -> None:
        self.spec = spec
        self._engine_factory = engine_factory
        self._start_timeout_seconds = start_timeout_seconds
        self._shard_timeout_seconds = shard_timeout_seconds
        self._replicas: list[_Replica] = []
        self._lock = threading.Lock()  # close() may come from another thread while a replica is being replaced
        self._closed = False

    def __enter__(self) -> "TeacherPool":
        try:
            for number in range(self.spec.engine.replicas):
                self._begin(number, deaths=0)
            while any(replica.starting for replica in self._replicas):
                self._await(None)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def score_missing(self, examples_path: Path, store: ScoreStore) -> Iterator[ShardResult]:
        """Score each missing shard of a store and yield what was written, in the order in which shards are finished.

        Raises:
            TeacherFailed: with the teacher's own message if scoring raised; with the shard and its rows if more than
                ``max_restarts`` replicas died on it; with the last error if no replica is left.
        """
        work = _Work(examples_path.resolve(), store, ShardQueue(store.missing_shards(), self.spec.engine.max_restarts))
        try:
            while len(work.queue) or any(replica.in_flight for replica in self._replicas):
                self._hand_out(work)
                yield from self._await(work)
        finally:
            for replica in self._replicas:
                replica.in_flight.clear()

    def close(self) -> None:
        """Close idle engines in order, then end all replicas."""
        with self._lock:
            self._closed = True
            replicas, self._replicas = self._replicas, []
        if idle := [replica.actor.close.remote() for replica in replicas if not replica.starting and not replica.in_flight]:
            ray.wait(idle, num_returns=len(idle), timeout=CLOSE_SECONDS)
        for replica in replicas:
            ray.kill(replica.actor)

    def _begin(self, number: int, deaths: int) -> None:
        engine = self.spec.engine
        # Restarts are counted here, not by Ray: what a replica was working on when it died must be known.
        actor_class = ray.remote(TeacherReplica).options(
            num_cpus=engine.cpus,
            num_gpus=engine.tensor_parallel if engine.gpu else 0,
            max_restarts=0,
            runtime_env={"env_vars": engine_environment(engine)},
        )
        with self._lock:
            self._require_open()
            actor = actor_class.remote(self.spec, self._engine_factory)
            self._replicas.append(_Replica(number, actor, actor.start.remote(), time.monotonic(), deaths))

    def _hand_out(self, work: _Work) -> None:
        """Fill the windows, least in flight first."""
        while len(work.queue):
            free = [replica for replica in self._replicas if not replica.starting and len(replica.in_flight) < WINDOW]
            if not free:
                return
            replica, shard = min(free, key=lambda replica: len(replica.in_flight)), work.queue.next()
            if not replica.in_flight:
                replica.since = time.monotonic()
            result = replica.actor.score_shard.remote(work.examples_path, work.store.path.resolve(), shard)
            replica.in_flight[result] = shard

    def _await(self, work: _Work | None) -> list[ShardResult]:
        """Wait for whatever comes next, and return the shards that are finished."""
        owners = {ref: replica for replica in self._replicas for ref in replica.awaited()}
        self._require_open()
        done, _ = ray.wait(list(owners), num_returns=1, timeout=POLL_SECONDS)
        results = [result for ref in done if (result := self._collect(owners[ref], ref, work))]
        for replica in list(self._replicas):
            self._check_time(replica, work)
        return results

    def _collect(self, replica: _Replica, ref: ray.ObjectRef, work: _Work | None) -> ShardResult | None:
        try:
            value = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, EngineDied):
                self._replace(replica, work, str(error.cause))
                return None
            shard = replica.in_flight.get(ref)
            doing = f"failed on {work.describe(shard)}" if work and shard is not None else "could not start"
            raise TeacherFailed(f"the teacher {doing}: {type(error.cause).__name__}: {error.cause}") from error.cause
        except RayError as error:
            self._replace(replica, work, f"{type(error).__name__}: {error}")
            return None
        replica.since = time.monotonic()
        if replica.starting:
            replica.starting = None
            return None
        del replica.in_flight[ref]
        return value

    def _check_time(self, replica: _Replica, work: _Work | None) -> None:
        seconds = time.monotonic() - replica.since
        if replica.starting and seconds > self._start_timeout_seconds:
            replica.deaths = self.spec.engine.max_restarts  # there is no room for it: trying again would wait again
            self._replace(replica, work, self._no_room(seconds))
        elif replica.in_flight and seconds > self._shard_timeout_seconds:
            self._replace(replica, work, f"no answer for {seconds:.0f} s")

    def _replace(self, replica: _Replica, work: _Work | None, error: str) -> None:
        """Start another replica in the place of one that died, and put back what it had."""
        with self._lock:
            self._require_open()
            self._replicas.remove(replica)
        max_restarts = self.spec.engine.max_restarts
        log.warning("teacher replica %d died: %s", replica.number, error)
        ray.kill(replica.actor)
        shards = list(replica.in_flight.values())
        if work is not None and shards:
            work.queue.hand_back(shards[1:])
            if deaths := work.queue.died_on(shards[0]):
                raise TeacherFailed(
                    f"{work.describe(shards[0])} could not be scored: {deaths} replicas died on it, the last with: {error}; "
                    f"take out the row that ends the engine, or raise teacher.engine.max_restarts {max_restarts}"
                )
        if replica.deaths < max_restarts:
            self._begin(replica.number, replica.deaths + 1)
        elif work is None or not self._replicas:
            raise TeacherFailed(
                f"teacher replica {replica.number} died {replica.deaths + 1} times and is not started again "
                f"(teacher.engine.max_restarts {max_restarts}); its last error: {error}"
            )

    def _no_room(self, seconds: float) -> str:
        engine = self.spec.engine
        gpus = engine.tensor_parallel if engine.gpu else 0
        cluster, free = ray.cluster_resources(), ray.available_resources()
        return (
            f"no engine within {seconds:.0f} s; {engine.replicas} replicas want {engine.cpus:g} CPUs and {gpus} GPUs each, "
            f"the cluster has {cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs, of which "
            f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free; lower teacher.engine.replicas or what each wants"
        )

    def _require_open(self) -> None:
        if self._closed:
            raise TeacherFailed("the teacher pool was closed while it was in use")
