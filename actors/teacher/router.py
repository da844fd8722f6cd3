"""The router of the score service: which replica scores which rows, and who hears of them.

Rows of all callers wait in one queue and go to replicas in batches, least in flight first; a row that several callers ask
for at once is scored once. Only references pass through the router: scores travel from the replica to the caller.
"""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from actors.engines.base import EngineDied
from actors.handles import RemoteMethod
from actors.monitors.prometheus import ServiceMetrics
from actors.records import Example
from actors.teacher.replica import ReplicaHandle
from actors.teacher.shard_queue import TRIES

BATCHES_AT_ONCE = 2
"""Batches a replica holds: one has the engine, the other waits for it."""


class RowFailed(RuntimeError):
    """The teacher cannot score a row, or cannot score at all any more; the message says which and why."""


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """What the router allows."""

    rows_per_batch: int
    """Rows given to a replica at once."""
    most_rows: int
    """Rows that may be asked for and not scored yet; who asks for more waits until there is room."""
    longest_row: int
    """Tokens of the longest row the engines take."""
    vocab_size: int
    """V: token ids are below it."""
    answer_seconds: float
    """A replica that works longer than this on a batch counts as dead."""
    run: str = "unnamed"
    """Name of the run it serves, for those who watch."""


@dataclass(frozen=True, slots=True)
class LostReplica:
    """What the router tells of a replica that died."""

    number: int
    """Which one."""
    error: str
    """How it died."""
    answered: bool
    """Whether it had scored anything before."""


@dataclass(eq=False, slots=True)
class _Request:
    """A row that somebody waits for."""

    example: Example
    scores: "asyncio.Future[ray.ObjectRef]"
    deaths: int = 0
    """Replicas that died while they held it. From the first on it is tried alone, on a replica that holds nothing else."""
    alone: bool = False
    """Whether it failed beside others, so that it must show whether it is to blame."""


@dataclass(eq=False, slots=True)
class _Replica:
    """One engine, as the router knows it."""

    number: int
    actor: ReplicaHandle
    batches: list[list[_Request]] = field(default_factory=list)
    answered: bool = False
    """Whether it has scored anything."""

    @property
    def tries_one_alone(self) -> bool:
        """Whether it holds a row that must have it for itself."""
        return any(asked.alone for batch in self.batches for asked in batch)


class RouterHandle(Protocol):
    """Handle of the actor that a ``ScoreRouter`` becomes."""

    @property
    def score(self) -> RemoteMethod[[Sequence[Example]], list[ray.ObjectRef]]:
        """See ``ScoreRouter.score``."""
        ...

    @property
    def put_replica(self) -> RemoteMethod[[int, ReplicaHandle], None]:
        """See ``ScoreRouter.put_replica``."""
        ...

    @property
    def next_lost(self) -> RemoteMethod[[], LostReplica]:
        """See ``ScoreRouter.next_lost``."""
        ...

    @property
    def give_up(self) -> RemoteMethod[[str], None]:
        """See ``ScoreRouter.give_up``."""
        ...


class ScoreRouter:
    """Hands rows to replicas. An asynchronous Ray actor: all of it runs in one thread, between awaits undisturbed."""

    def __init__(self, limits: RouterLimits) -> None:
        self._limits = limits
        self._replicas: dict[int, _Replica] = {}
        self._asked: dict[tuple[str, bytes], _Request] = {}  # by what is asked, until it is scored
        self._waiting: deque[_Request] = deque()
        self._room = asyncio.Condition()
        self._lost: asyncio.Queue[LostReplica] = asyncio.Queue()
        self._given_up: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._live = ServiceMetrics(limits.run)
        self.most_asked = 0

    async def score(self, examples: Sequence[Example]) -> list[ray.ObjectRef]:
        """Return a reference to the scores of each row once all are there.

        Raises:
            ValueError: naming a row that no engine of these would take.
            RowFailed: naming a row whose scoring failed by itself, or with the last words of the teacher.
        """
        for example in examples:
            self._require_fits(example)
        futures = [await self._ask(example) for example in examples]
        self._hand_out()  # together: which rows a replica reads at once does not depend on when it was free
        # Shielded: the row may be another caller's too, and is scored even if this one goes away.
        return list(await asyncio.gather(*(asyncio.shield(future) for future in futures)))

    async def put_replica(self, number: int, actor: ReplicaHandle) -> None:
        """Take a replica whose engine is there into service."""
        self._replicas[number] = _Replica(number, actor)
        self._hand_out()

    async def next_lost(self) -> LostReplica:
        """Wait until a replica died, and tell of it."""
        return await self._lost.get()

    async def give_up(self, error: str) -> None:
        """Tell all who wait, and all who will ask, that no replica will come any more."""
        self._given_up = error
        for asked in list(self._asked.values()):
            self._settle(asked, error=RowFailed(error))
        async with self._room:
            self._room.notify_all()

    async def counts(self) -> dict[str, int]:
        """Return how many rows wait, are with replicas, and were asked for at most at one time; and how many replicas serve."""
        return {**self._load(), "most_asked": self.most_asked}

    def _load(self) -> dict[str, int]:
        held = sum(len(batch) for replica in self._replicas.values() for batch in replica.batches)
        return {"waiting": len(self._waiting), "held": held, "replicas": len(self._replicas)}

    def _require_fits(self, example: Example) -> None:
        tokens, limits, where = len(example.token_ids), self._limits, _named(example)
        if tokens > limits.longest_row:
            raise ValueError(f"{where} has {tokens} tokens; this teacher was started for rows of at most {limits.longest_row}")
        if not example.loss_mask.any():
            raise ValueError(f"{where} has no target: its loss_mask is nowhere True, so there is nothing to score")
        if example.loss_mask[0]:
            raise ValueError(f"{where} has a target at position 0, which nothing predicts; begin the row with a prompt token")
        lowest, highest = int(example.token_ids.min()), int(example.token_ids.max())
        if lowest < 0 or highest >= limits.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"{where} holds token id {wrong}; the teacher's ids are 0 to {limits.vocab_size - 1}")

    async def _ask(self, example: Example) -> "asyncio.Future[ray.ObjectRef]":
        if not self._has_room(example):
            self._hand_out()  # so that there will be some
            async with self._room:
                await self._room.wait_for(lambda: self._has_room(example))
        if self._given_up is not None:
            raise RowFailed(self._given_up)
        if (asked := self._asked.get(_question(example))) is None:
            asked = _Request(example, asyncio.get_running_loop().create_future())
            self._asked[_question(example)] = asked
            self._waiting.append(asked)
            self.most_asked = max(self.most_asked, len(self._asked))
        return asked.scores

    def _has_room(self, example: Example) -> bool:
        return _question(example) in self._asked or len(self._asked) < self._limits.most_rows

    def _hand_out(self) -> None:
        """Give batches to replicas until none can take any more."""
        self._hand_out_batches()
        self._live.show(**self._load())

    def _hand_out_batches(self) -> None:
        most = min(self._limits.rows_per_batch, math.ceil(len(self._waiting) / max(1, len(self._replicas))))
        while self._waiting:
            free = [one for one in self._replicas.values() if len(one.batches) < BATCHES_AT_ONCE and not one.tries_one_alone]
            if not free:
                return
            replica = min(free, key=lambda one: len(one.batches))
            batch = self._next_batch(most, alone=not replica.batches)
            if not batch:
                return
            replica.batches.append(batch)
            task = asyncio.get_running_loop().create_task(self._serve(replica, batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next_batch(self, most: int, alone: bool) -> list[_Request]:
        """Take the rows that waited longest: several, or a single one that must be tried alone, if it can be."""
        if self._waiting[0].alone:
            return [self._waiting.popleft()] if alone else []
        batch: list[_Request] = []
        while self._waiting and not self._waiting[0].alone and len(batch) < most:
            batch.append(self._waiting.popleft())
        return batch

    async def _serve(self, replica: _Replica, batch: list[_Request]) -> None:
        try:
            rows = [asked.example for asked in batch]
            *scores, done = replica.actor.answer.options(num_returns=len(rows) + 1).remote(rows)
            await asyncio.wait_for(asyncio.wrap_future(done.future()), self._limits.answer_seconds)
        except TimeoutError:
            self._lose(replica, f"no answer for {self._limits.answer_seconds:.0f} s")
        except RayTaskError as error:
            if isinstance(error.cause, EngineDied):
                self._lose(replica, str(error.cause))
            else:
                self._blame(batch, f"{type(error.cause).__name__}: {error.cause}")
        except RayError as error:
            self._lose(replica, f"{type(error).__name__}: {error}")
        else:
            replica.answered = True
            self._live.scored(len(batch))
            for asked, reference in zip(batch, scores, strict=True):
                self._settle(asked, scores=reference)
        if batch in replica.batches:
            replica.batches.remove(batch)
        async with self._room:
            self._room.notify_all()
        self._hand_out()

    def _blame(self, batch: list[_Request], error: str) -> None:
        """Scoring raised: a row that was alone is to blame, and of several each must show it alone."""
        if len(batch) == 1:
            self._settle(batch[0], error=RowFailed(f"{_named(batch[0].example)}: {error}"))
            return
        for asked in batch:
            self._try_alone(asked)

    def _lose(self, replica: _Replica, error: str) -> None:
        """A replica died, of which its other batch hears too: only the first to notice puts back what it held."""
        if self._replicas.get(replica.number) is not replica:
            return
        del self._replicas[replica.number]
        ray.kill(replica.actor)
        self._lost.put_nowait(LostReplica(replica.number, error, replica.answered))
        for asked in [asked for batch in replica.batches for asked in batch]:
            asked.deaths += 1
            if asked.deaths < TRIES:
                self._try_alone(asked)
            else:
                failure = f"{TRIES} replicas died on {_named(asked.example)}, the last with: {error}"
                self._settle(asked, error=RowFailed(failure))
        replica.batches.clear()

    def _try_alone(self, asked: _Request) -> None:
        asked.alone = True
        self._waiting.append(asked)

    def _settle(self, asked: _Request, scores: ray.ObjectRef | None = None, error: RowFailed | None = None) -> None:
        if self._asked.pop(_question(asked.example), None) is None:
            return  # given up meanwhile
        if error is not None:
            asked.scores.set_exception(error)
            asked.scores.exception()  # looked at: its callers may be gone
        else:
            assert scores is not None
            asked.scores.set_result(scores)


def _question(example: Example) -> tuple[str, bytes]:
    """Return what is asked of the teacher: the row, and its candidates."""
    return example.key, b"" if example.candidates is None else example.candidates.tobytes()


def _named(example: Example) -> str:
    return f"row {example.row} (key {example.key[:12]})"
