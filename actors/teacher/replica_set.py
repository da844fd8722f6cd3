"""The replicas of one teacher as Ray actors: started where there is room, started again when they die, ended in order."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.engines.base import EngineDied, EngineFactory, TeacherSpec, engine_environment
from actors.placement import read_nodes, replica_request, reserve
from actors.room import require_room
from actors.teacher.parity import Probe, ScoreParity
from actors.teacher.replica import CALLS_AT_ONCE, EngineStarted, ReplicaHandle, TeacherReplica

logger = logging.getLogger("atkd")

POLL_SECONDS = 1.0
CLOSE_SECONDS = 10.0
LOG_LINES = 3  # quoted in an error
PAUSE_SECONDS = 3.0  # before the engine of a replica that died starts again: its device may not be free yet


class TeacherFailed(RuntimeError):
    """The teacher cannot score, and trying again would not help."""


@dataclass(eq=False)
class Replica:
    """The driver's view of one replica."""

    number: int
    room: PlacementGroup
    """Its place in one node."""
    actor: ReplicaHandle
    starting: ray.ObjectRef | None
    """The result of ``start``, until the engine is there."""
    since: float
    """Monotonic time at which it was started, or at which it took up its oldest shard."""
    deaths: int = 0
    """Since it last scored a shard."""
    has_room: bool = False
    """Whether it was seen with its devices."""
    log: Path | None = None
    """Where its engine prints."""
    in_flight: dict[ray.ObjectRef, int] = field(default_factory=dict)
    """Result to shard, oldest first."""

    def awaited(self) -> list[ray.ObjectRef]:
        """What is under way here."""
        return [self.starting] if self.starting else list(self.in_flight)

    def last_words(self) -> str:
        """Return where its engine prints and the last lines of that, to follow an error; an empty text where there are none."""
        try:
            lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()] if self.log else []
        except OSError:
            return ""
        last = [line for line in lines if line][-LOG_LINES:]
        return f" ({self.log} ends with: {' | '.join(last)})" if last else ""

    def end(self) -> None:
        """End its process and give its room back."""
        ray.kill(self.actor)
        remove_placement_group(self.room)


class Replicas:
    """The replicas that are there now. ``close`` may come from any thread; all else from one at a time.

    Args:
        spec: what each replica's engine is built from; its number of replicas is settled, not ``auto``.
        engine_factory: builds the engine inside the replica; picklable.
        probe: rows whose scores the first replica holds against the teacher's plain forward pass when it starts.
        on_death: hears of each replica that died: its number, and how.
        logs: folder in which each replica leaves what its engine prints.
    """

    def __init__(
        self, spec: TeacherSpec, engine_factory: EngineFactory, probe: Probe | None = None,
        on_death: Callable[[int, str], None] = lambda number, error: None, logs: Path | None = None,
    ) -> None:  # fmt: skip
        assert isinstance(spec.engine.replicas, int), "auto is settled where it is known what else the run holds"
        self.spec = spec
        self.vocab_size = 0  # V, once an engine is there
        self.parity: ScoreParity | str | None = None  # of the probe, or why there is none
        self.parity_remark = ""  # which rows of the probe were left out of it, in words
        self.way = ""  # how engines come to their scores, in words
        self._probe = probe
        self._on_death = on_death
        self._need = replica_request(spec.engine)
        self._count = spec.engine.replicas
        self._engine_factory = engine_factory
        self._logs = logs
        self._replicas: list[Replica] = []
        self._lock = threading.Lock()  # close() may come while a replica is being replaced
        self._closed = False

    def __iter__(self) -> Iterator[Replica]:
        return iter(list(self._replicas))

    def __len__(self) -> int:
        return len(self._replicas)

    def start(self) -> None:
        """Start all of them and wait until their engines are there.

        Raises:
            ValueError: at once, if the cluster, were all of it free, could not hold them.
            TeacherFailed: with the engine's own error, or saying what there is no room for.
        """
        require_room(read_nodes(), self._need, self._count)
        try:
            for number in range(self._count):
                self._begin(number, deaths=0)
            while starting := {replica.starting: replica for replica in self if replica.starting}:
                done, _ = ray.wait(list(starting), num_returns=1, timeout=POLL_SECONDS)
                for ref in done:
                    self.note_started(starting[ref], needed=True)
                self.check_starts(needed=True)
        except BaseException:
            self.close()
            raise

    def note_started(self, replica: Replica, needed: bool = False) -> None:
        """Take down that an engine is there; start another replica where it died on the way.

        Raises:
            TeacherFailed: with the engine's own error; or if it is not started again and was ``needed``, or none is left.
        """
        try:
            started: EngineStarted = ray.get(replica.starting)
        except RayTaskError as error:
            if not isinstance(error.cause, EngineDied):
                message = f"{type(error.cause).__name__}: {error.cause}"
                if self.vocab_size == 0:  # no engine of this teacher ever started: it is the teacher, not the device
                    raise TeacherFailed(f"the teacher could not start: {message}{replica.last_words()}") from error.cause
                self.replace(replica, message, needed=needed)
            else:
                self.replace(replica, str(error.cause), needed=needed)
        except RayError as error:
            self.replace(replica, f"{type(error).__name__}: {error}", needed=needed)
        else:
            replica.starting, replica.since = None, time.monotonic()
            self.vocab_size = started.vocab_size
            if self.parity is None:
                self.parity, self.parity_remark = started.parity, started.remark
            self.way = started.way

    def check_starts(self, needed: bool = False) -> None:
        """Give up replicas whose engines do not come; raises as ``replace``."""
        for replica in [one for one in self if one.starting]:
            if not replica.has_room and placement_group_table(replica.room)["state"] == "CREATED":
                replica.has_room, replica.since = True, time.monotonic()  # what it loads from now on is its own time
            seconds = time.monotonic() - replica.since
            if seconds > self.spec.engine.start_seconds:
                replica.deaths = self.spec.engine.max_restarts  # trying again would wait again
                self.replace(replica, self._no_engine(replica, seconds), needed=needed)

    def replace(self, replica: Replica, error: str, *, held: str = "", aside: str = "", needed: bool = False) -> None:
        """End a replica that died, and start another in its place unless that was done too often in a row.

        Args:
            replica: which one.
            error: how it died.
            held: in words, what it held.
            aside: in words, what else the reader must know if this was the end.
            needed: whether the others alone will not do.

        Raises:
            TeacherFailed: if it is not started again, and was needed or was the last.
        """
        with self._lock:
            self.require_open()
            self._replicas.remove(replica)
        max_restarts = self.spec.engine.max_restarts
        logger.warning("teacher replica %d died: %s", replica.number, error)
        self._on_death(replica.number, error)
        replica.end()
        if replica.deaths < max_restarts:
            self._begin(replica.number, replica.deaths + 1)
        elif needed or not self._replicas:
            raise TeacherFailed(
                f"teacher replica {replica.number} died {replica.deaths + 1} times in a row{held} and is not started again "
                f"(teacher.engine.max_restarts {max_restarts}); its last error: {error}{replica.last_words()}{aside}"
            )

    def require_open(self) -> None:
        """Raise if the pool was closed."""
        if self._closed:
            raise TeacherFailed("the teacher pool was closed while it was in use")

    def close(self) -> None:
        """Close idle engines in order, then end all replicas."""
        with self._lock:
            self._closed = True
            replicas, self._replicas = self._replicas, []
        if idle := [replica.actor.close.remote() for replica in replicas if not replica.starting and not replica.in_flight]:
            ray.wait(idle, num_returns=len(idle), timeout=CLOSE_SECONDS)
        for replica in replicas:
            replica.end()

    def _begin(self, number: int, deaths: int) -> None:
        engine = self.spec.engine
        with self._lock:
            self.require_open()
            room = reserve(self._need)
            # Restarts are counted here, not by Ray: what a replica was working on when it died must be known.
            actor_class = ray.remote(TeacherReplica).options(
                num_cpus=engine.cpus,
                num_gpus=engine.tensor_parallel if engine.gpu else 0,
                resources=engine.resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(room),
                max_restarts=0,
                max_concurrency=CALLS_AT_ONCE,
                runtime_env={"env_vars": engine_environment(engine)},
            )
            try:
                log = self._logs / f"replica-{number}.log" if self._logs else None
                actor = actor_class.remote(self.spec, self._engine_factory, log, pause_seconds=PAUSE_SECONDS * min(deaths, 10))
            except BaseException:
                remove_placement_group(room)
                raise
            probe = self._probe if number == 0 and self.parity is None else None
            self._replicas.append(Replica(number, room, actor, actor.start.remote(probe), time.monotonic(), deaths, log=log))

    def _no_engine(self, replica: Replica, seconds: float) -> str:
        if replica.has_room:
            return (
                f"no engine within {seconds:.0f} s, though it has its {self._need}; it loads for longer, or hangs: a larger "
                "teacher.engine.start_seconds gives it more time"
            )
        free = sum(self._need.times_in(node.free) for node in read_nodes() if self._need.may_stand_on(node))
        return (
            f"no room within {seconds:.0f} s: {self._need.many(self._count)} are wanted, other work leaves room for {free} now; "
            "wait until it ends, or lower teacher.engine.replicas or what each wants"
        )
