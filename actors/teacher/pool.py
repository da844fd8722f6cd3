"""The teacher pool: the driver's loop that hands shards to replicas.

A replica's engine works on one shard while the one before is encoded and written; it writes its shards itself and returns
counts. Replicas belong to the driver and die with it.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import ray
from ray.exceptions import RayError, RayTaskError

from actors.engines.base import EngineDied, EngineFactory, TeacherSpec
from actors.engines.build import build_engine
from actors.monitors.prometheus import TeacherMetrics
from actors.score_store.leases import LEASE_SECONDS
from actors.score_store.store import ScoreStore, ScoringFailed
from actors.teacher.parity import Probe, ScoreParity
from actors.teacher.replica import CALLS_AT_ONCE, ShardResult
from actors.teacher.replica_set import POLL_SECONDS, Replica, Replicas, TeacherFailed
from actors.teacher.router import RouterLimits
from actors.teacher.service import ScoreService, serve
from actors.teacher.shard_queue import ScoringWork

WINDOW = CALLS_AT_ONCE  # shards of one replica: one has the engine, the other is being written or waits for the engine
GATHER_SECONDS = 2e-4
"""A look at what is finished takes longer the more replicas there are, so for each of them it gathers for so long. A replica does
not run dry meanwhile: it holds another shard."""


class TeacherPool:
    """The replicas of one teacher. A context manager; ``score_missing`` may run in any thread, one at a time.

    Entering it raises a ValueError at once if the cluster, were all of it free, could not hold the replicas.

    Args:
        spec: what each replica's engine is built from; its number of replicas is settled, not ``auto``.
        engine_factory: builds the engine inside the replica; picklable.
        shard_timeout_seconds: a replica that works longer than this on one shard counts as dead.
        lease_seconds: another job that was silent for so long is taken for dead, and its shards are scored here.
        probe: rows whose scores are compared with the teacher's plain forward pass before the pool is entered.
        live: where the work is shown while it runs.
        on_death: hears of each replica that died: its number, and how.
        logs: folder in which each replica leaves what its engine prints; one that every node sees.
    """

    def __init__(
        self,
        spec: TeacherSpec,
        *,
        engine_factory: EngineFactory = build_engine,
        shard_timeout_seconds: float = 3600.0,
        lease_seconds: float = LEASE_SECONDS,
        probe: Probe | None = None,
        live: TeacherMetrics | None = None,
        on_death: Callable[[int, str], None] = lambda number, error: None,
        logs: Path | None = None,
    ) -> None:
        self.spec = spec
        self._live = live or TeacherMetrics("unnamed")
        self._shard_timeout_seconds = shard_timeout_seconds
        self._lease_seconds = lease_seconds
        self._replicas = Replicas(spec, engine_factory, probe, on_death, logs)

    def __enter__(self) -> "TeacherPool":
        self._replicas.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def parity(self) -> ScoreParity | str | None:
        """What came of the probe: numbers, or in words why there are none; nothing without a probe."""
        return self._replicas.parity

    @property
    def parity_remark(self) -> str:
        """In words, which rows of the probe there was no time for; empty where there was for all."""
        return self._replicas.parity_remark

    @property
    def way(self) -> str:
        """How the engines come to their scores, in words."""
        return self._replicas.way

    def score_missing(
        self, examples_path: Path, store: ScoreStore, on_wait: Callable[[int], None] = lambda shards: None
    ) -> Iterator[ShardResult]:
        """Score each missing shard of a store and yield what was written, in the order in which shards are finished.

        Other jobs may fill the same store at the same time: each shard is scored by one of them, and what another job scores
        is waited for and not yielded. When this ends, nothing is missing. A failure declared for the store ends it too, so an
        old one is to be cleared first. ``on_wait`` is called, with their number, every second in which all shards that are
        missing are with other jobs.

        Raises:
            TeacherFailed: with the teacher's own message if scoring raised; with the last error if no replica is left; with
                the other job's words if the store is declared failed; and, after all other shards are scored, with the
                shards set aside because replicas died on them, their rows and last errors. Another call tries those again.
        """
        work = ScoringWork(examples_path.resolve(), store, WINDOW, self._lease_seconds, ahead=len(list(self._replicas)))
        try:
            shown = -math.inf
            while work.waits or any(replica.in_flight for replica in self._replicas):
                self._hand_out(work)
                if time.monotonic() - shown > POLL_SECONDS:  # a number for each replica, which nobody reads more often
                    shown = time.monotonic()
                    self._show_in_flight()
                for result in self._await(work, on_wait):
                    self._live.scored(result.tokens, 1 - result.info.mean_tail_mass, result.mean_uncertainty)
                    yield result
                work.keep_up()
        except ScoringFailed as error:
            raise TeacherFailed(f"another job that scores {store.place} gave up: {error}") from error
        finally:
            for replica in self._replicas:
                replica.in_flight.clear()
            self._show_in_flight()
            work.close()
        if set_aside := work.describe_set_aside():
            raise TeacherFailed(
                f"{set_aside}. All other shards are scored; take out the row that ends the engine, or start again"
            )

    def serving(self, most_rows: int = 4096, answer_seconds: float = 600.0) -> AbstractContextManager[ScoreService]:
        """Answer for rows on demand while the body runs, from any task or actor of this Ray; not while shards are scored.

        Args:
            most_rows: rows that may be asked for and not scored yet; who asks for more waits.
            answer_seconds: a replica that works longer than this on a batch counts as dead.
        """
        limits = RouterLimits(
            rows_per_batch=self.spec.engine.rows_per_call,
            most_rows=most_rows,
            longest_row=self.spec.longest_row,
            vocab_size=self._replicas.vocab_size,
            answer_seconds=answer_seconds,
            run=self._live.run,
        )
        return serve(self._replicas, limits)

    def close(self) -> None:
        """Close idle engines in order, then end all replicas."""
        self._replicas.close()

    def _show_in_flight(self) -> None:
        self._live.in_flight({replica.number: len(replica.in_flight) for replica in self._replicas})

    def _hand_out(self, work: ScoringWork) -> None:
        """Give replicas what they may take, least in flight first, until none takes any more."""
        for held in range(WINDOW):
            for replica in [one for one in self._replicas if len(one.in_flight) == held and not one.starting]:
                if not work.waits:
                    return
                self._offer(replica, work)

    def _offer(self, replica: Replica, work: ScoringWork) -> None:
        others_proven = any(other.deaths == 0 for other in self._replicas if other is not replica)
        shard = work.next(list(replica.in_flight.values()), proven=replica.deaths == 0, others_proven=others_proven)
        if shard is None:
            return
        if not replica.in_flight:
            replica.since = time.monotonic()
        result = replica.actor.score_shard.remote(work.examples_path, work.store_place, shard, work.known)
        replica.in_flight[result] = shard

    def _await(self, work: ScoringWork, on_wait: Callable[[int], None]) -> list[ShardResult]:
        """Wait for whatever comes next, and return the shards that are finished."""
        owners = {ref: replica for replica in self._replicas for ref in replica.awaited()}
        self._replicas.require_open()
        if not owners:
            if work.waits:  # all that is missing is with other jobs
                on_wait(work.waiting)
                time.sleep(POLL_SECONDS)
            return []
        done, _ = ray.wait(list(owners), num_returns=1, timeout=POLL_SECONDS)
        if done:
            done, _ = ray.wait(list(owners), num_returns=len(owners), timeout=GATHER_SECONDS * len(self._replicas))
        results = [result for ref in done if (result := self._collect(owners[ref], ref, work))]
        self._replicas.check_starts()
        now = time.monotonic()
        for replica in self._replicas:
            seconds = now - replica.since
            if replica.in_flight and seconds > self._shard_timeout_seconds:
                self._died(replica, work, f"no answer for {seconds:.0f} s")
        return results

    def _collect(self, replica: Replica, ref: ray.ObjectRef, work: ScoringWork) -> ShardResult | None:
        if ref not in replica.awaited():  # it died a moment ago, and what it held waits again
            return None
        if replica.starting:
            self._replicas.note_started(replica)
            return None
        try:
            result: ShardResult = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, EngineDied):
                self._died(replica, work, str(error.cause))
                return None
            failed = f"failed on {work.describe(replica.in_flight[ref])}"
            raise TeacherFailed(f"the teacher {failed}: {type(error.cause).__name__}: {error.cause}") from error.cause
        except RayError as error:
            self._died(replica, work, f"{type(error).__name__}: {error}")
            return None
        replica.since, replica.deaths = time.monotonic(), 0
        work.scored(replica.in_flight.pop(ref), result.info)
        return result

    def _died(self, replica: Replica, work: ScoringWork, error: str) -> None:
        """Put back what a replica had that died, and start another in its place."""
        shards = list(replica.in_flight.values())
        replica.in_flight.clear()
        work.died_on(shards, error)
        held = f" while it held {' and '.join(work.describe(shard) for shard in shards)}" if shards else ""
        aside = f"; {described}" if (described := work.describe_set_aside()) else ""
        self._replicas.replace(replica, error, held=held, aside=aside)
