"""Virtual time for ``benchmarks.scale``: a Ray whose actors answer after tokens / speed, and the time the driver itself takes.

The driver's classes are the real ones. Only the names ``ray`` and ``time`` in their modules, and the five that make room in a
cluster, are others while a ``World`` is entered. Time is what the driver waited, on paper, and the processor time that its thread
took, so that a driver that is too slow is late here too.
"""

import heapq
import json
import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from ray.exceptions import RayActorError

from actors.monitors import prometheus
from actors.score_store import leases, store
from actors.score_store.shard_files import ShardInfo
from actors.teacher import pool, replica_set, shard_queue
from actors.teacher.replica import EngineStarted, ShardResult
from benchmarks.scale.ray_costs import NO_SPREAD, RayCosts
from orchestrator.run import score_identity, scoring

ROW_TOKENS = 1000
IDENTITY = {"top_k": 2, "vocab_size": 1000}
UNEVEN = 0.1
"""Shards have up to so much more or fewer tokens than they should, or all replicas would answer at once."""


@dataclass(frozen=True)
class Case:
    """What is driven: so many replicas of so many tokens a second, shards of so many rows."""

    replicas: int
    speed: float
    shards: int
    shard_rows: int
    lost: float = 0.0
    """Share of the replicas that is lost for a while."""

    @property
    def pace(self) -> float:
        """Shards a second that all replicas could score."""
        return self.replicas * self.speed / (self.shard_rows * ROW_TOKENS)


@dataclass(eq=False, slots=True)
class Ref:
    """A result that may still be under way."""

    ready: bool = False
    value: Any = None


@dataclass(eq=False)
class Room:
    """A placement group."""

    state: str


@dataclass
class World:
    """The cluster, and its time in seconds."""

    case: Case
    costs: RayCosts = RayCosts()
    load_seconds: float = 60.0
    now: float = 0.0
    """As the driver saw it last."""
    busy: float = 0.0
    """Seconds of it in which the driver's thread worked, Ray's part included."""
    in_ray: float = 0.0
    """Of these, Ray's part; by its costs."""
    scored: Counter[int] = field(default_factory=Counter)
    """How often each shard of the present store was scored to its end."""
    begun: Counter[int] = field(default_factory=Counter)
    """How often each was begun."""
    cut_off: Counter[int] = field(default_factory=Counter)
    """How often each was with a replica that was lost."""
    times: "array[float]" = field(default_factory=lambda: array("d"))
    """When shards were finished."""
    tokens: "array[int]" = field(default_factory=lambda: array("q"))
    """Tokens of each of these."""
    calls: int = 0
    owed: float = 0.0
    """Ray's part since the driver's time was noted last."""
    away_until: float = 0.0
    """When the nodes that were lost return."""
    actors: list["Actor"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count, self._draw, self._mark = count(), random.Random(0), time.thread_time()

    # ---- time

    def at(self, when: float, task: Callable[[], None]) -> None:
        """Have something happen."""
        heapq.heappush(self._events, (when, next(self._count), task))

    @contextmanager
    def outside(self, ray_seconds: float = 0.0) -> Iterator[None]:
        """Run what is not the driver's: its time so far is noted, with Ray's part, and that of the body is nobody's."""
        own, ray_seconds, self.owed = time.thread_time() - self._mark, ray_seconds + self.owed, 0.0
        self.busy += own + ray_seconds
        self.in_ray += ray_seconds
        self.now += own + ray_seconds
        try:
            yield
        finally:
            self._mark = time.thread_time()

    def pass_until(self, end: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Let things happen, those first that should have happened by now."""
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        while not enough() and self._events and self._events[0][0] <= end:
            when, _, task = heapq.heappop(self._events)
            self.now = when
            task()
        if not enough():
            self.now = max(self.now, end)

    def monotonic(self) -> float:
        """``time.monotonic``: no clock stands still, and the driver's time is noted only now and then."""
        self.now += 1e-9
        return self.now

    def sleep(self, seconds: float) -> None:
        """``time.sleep``."""
        with self.outside():
            self.pass_until(self.now + seconds)

    # ---- Ray

    def wait(self, refs: Sequence[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        """``ray.wait``: the first so many that are ready, in their order."""
        with self.outside(self.costs.wait + self.costs.waited * len(refs)):
            left = [num_returns - sum(ref.ready for ref in refs)]
            if left[0] > 0:
                self._awaited, self._left = {id(ref) for ref in refs if not ref.ready}, left
                self.pass_until(self.now + timeout, lambda: left[0] <= 0)
                self._awaited = set()
            ready = [ref for ref in refs if ref.ready][:num_returns]
            return ready, []  # nobody asks for the rest

    _awaited: set[int] = field(default_factory=set)
    _left: list[int] = field(default_factory=list)

    def answer(self, ref: Ref, value: object) -> None:
        """Have a result there."""
        ref.ready, ref.value = True, value
        if id(ref) in self._awaited:
            self._left[0] -= 1

    def get(self, ref: Ref) -> Any:
        """``ray.get``."""
        assert ref.ready, "only finished results are fetched"
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def begin(self, actor_class: type) -> Any:
        """``ray.remote``: whatever the class, its actors are replicas here."""
        return SimpleNamespace(options=lambda **settings: SimpleNamespace(remote=lambda *given, **named: Actor(self)))

    def lose(self, replicas: int, seconds: float) -> None:
        """Lose the nodes of so many replicas, which return after a while."""
        self.away_until = self.now + seconds
        for actor in self.actors[:replicas]:
            actor.die()

    @property
    def whole_again(self) -> float:
        """When the replicas that were lost score again."""
        return self.away_until + self.load_seconds

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put this world in Ray's and the clock's place."""
        ray = SimpleNamespace(wait=self.wait, get=self.get, remote=self.begin, kill=lambda actor: None)
        clock = SimpleNamespace(monotonic=self.monotonic, sleep=self.sleep, time=time.time)
        names: list[tuple[Any, dict[str, Any]]] = [
            (pool, {"ray": ray, "time": clock}),
            (
                replica_set,
                {
                    "ray": ray, "time": clock, "read_nodes": list, "require_room": lambda *given: None,
                    "reserve": lambda need: Room("PENDING" if self.now < self.away_until else "CREATED"),
                    "placement_group_table": lambda room: {"state": room.state}, "remove_placement_group": lambda room: None,
                    "PlacementGroupSchedulingStrategy": lambda room: None,
                },
            ),
            (prometheus, {"ray": SimpleNamespace(is_initialized=lambda: True)}),
            *((module, {"time": clock}) for module in (shard_queue, leases, store, score_identity, scoring)),
        ]  # fmt: skip
        with ExitStack() as stack:
            for module, others in names:
                stack.enter_context(patch.multiple(module, **others))
            self._mark = time.thread_time()
            yield

    def finish(self, actor: "Actor", ref: Ref, folder: Path, shard: int, tokens: int) -> None:
        """Have a shard there, if its replica is."""
        if not actor.alive:
            return
        actor.under_way.pop(ref)
        info = write_info(folder, shard, self.case.shard_rows, tokens)
        self.scored[shard] += 1
        self.times.append(self.now)
        self.tokens.append(tokens)
        self.answer(ref, ShardResult(info, tokens, tokens / self.case.speed, 0.3))

    def draw_tokens(self) -> int:
        """Return the tokens of a shard."""
        return round(self.case.shard_rows * ROW_TOKENS * (1 + UNEVEN * self._draw.uniform(-1, 1)))


class Actor:
    """One replica: its engine takes one shard after the other."""

    def __init__(self, world: World) -> None:
        self.world, self.alive = world, True
        self.under_way: dict[Ref, int] = {}
        self._free = 0.0
        self.start, self.score_shard, self.close = (
            SimpleNamespace(remote=method) for method in (self._start, self._score, self._close)
        )
        world.actors.append(self)

    def die(self) -> None:
        """Be lost with its node."""
        self.alive = False
        self.world.actors.remove(self)
        self.world.cut_off.update(self.under_way.values())
        for ref in self.under_way:
            self.world.answer(ref, RayActorError())

    def _start(self, probe: object) -> Ref:
        ref, world = Ref(), self.world
        ready = max(world.now, world.away_until) + (world.load_seconds if world.now < world.away_until else 0.0)
        world.at(ready, lambda: world.answer(ref, EngineStarted(1000)))
        return ref

    def _score(self, examples_path: Path, place: str, shard: int, known: object) -> Ref:
        world, ref = self.world, Ref()
        world.calls += 1
        world.owed += world.costs.call
        world.begun[shard] += 1
        tokens = world.draw_tokens()
        self._free = max(world.now, self._free) + tokens / world.case.speed
        self.under_way[ref] = shard
        world.at(self._free, lambda: world.finish(self, ref, Path(place), shard, tokens))
        return ref

    def _close(self) -> Ref:
        return Ref(ready=True)


def write_info(folder: Path, shard: int, rows: int, targets: int) -> ShardInfo:
    """Write the json of a shard, from which on it is there; of its rows and its index there are none."""
    info = ShardInfo(shard, rows, targets, 8 * targets, 4 * targets, "0" * 64, 0.01, 2.0, NO_SPREAD, NO_SPREAD)
    (folder / f"shard-{shard:05d}.json").write_text(json.dumps(asdict(info)))
    return info
