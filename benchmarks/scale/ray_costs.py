"""What real Ray takes of the driver, measured on a local one."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.score_store.sanity import ScoreRange, Spread
from actors.score_store.shard_files import ShardInfo
from actors.teacher.replica import ShardResult

NO_SPREAD = Spread(0.0, 0.0, 0.0)
LOOKS, CALLS = 50, 2000


@dataclass(frozen=True)
class RayCosts:
    """What Ray itself takes of the driver, in seconds of processor time."""

    call: float = 0.0
    """Of its thread, to begin a call and fetch its result."""
    wait: float = 0.0
    """Of its thread, for a look at results that are under way."""
    waited: float = 0.0
    """Of its thread, in such a look for each of them."""
    call_beside: float = 0.0
    """Of Ray's own threads in its process, for each call; they keep nothing waiting."""


class Answers:
    """An actor that answers like a replica, and one that does not."""

    async def score_shard(self, examples: Path, store: str, shard: int, known: ScoreRange | None) -> ShardResult:
        """Answer at once."""
        info = ShardInfo(shard, 8, 8000, 64_000, 32_000, "0" * 64, 0.01, 2.0, NO_SPREAD, NO_SPREAD)
        return ShardResult(info, 8000, 0.4, 0.3)

    async def hold(self) -> None:
        """Do not answer."""
        await asyncio.sleep(3600)


def ray_costs(replicas: int) -> RayCosts:
    """Measure a local Ray: a call and its result, and looks at as many results under way as replicas have."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        actor: Any = ray.remote(Answers).options(num_cpus=0, max_concurrency=4 * replicas + 10).remote()
        given = (Path("/rows.arrow"), Path("/store"), 7, ScoreRange.over([(NO_SPREAD, NO_SPREAD)]))
        ray.get([actor.score_shard.remote(*given) for _ in range(100)])
        thread, process = time.thread_time(), time.process_time()
        for _ in range(CALLS):
            ray.get(actor.score_shard.remote(*given))
        call, whole = (time.thread_time() - thread) / CALLS, (time.process_time() - process) / CALLS
        held = [actor.hold.remote() for _ in range(2 * replicas)]
        one, all_of_them = (look_seconds(some) for some in (held[:1], held))
        waited = max(0.0, (all_of_them - one) / max(1, len(held) - 1))
        return RayCosts(call, one, waited, max(0.0, whole - call))
    finally:
        ray.shutdown()


def look_seconds(refs: list[ray.ObjectRef]) -> float:
    """Return the processor time of a look at results of which none is there."""
    start = time.thread_time()
    for _ in range(LOOKS):
        ray.wait(refs, num_returns=1, timeout=0.001)
    return (time.thread_time() - start) / LOOKS
