"""The driver's side of scoring at the size of a large cluster: one process, the real books, a Ray and a clock on paper.

    python -m benchmarks.scale [--replicas 256] [--shards 1000000] [--tokens-per-second 20000] [--workers 1024] [--lost 0.1]

The pool, its queue, leases, stores, metrics, progress lines and event log are the real ones; replicas answer after tokens over
speed, and write no more of a shard than the json that makes it exist. What real Ray takes of the driver is measured first, on a
local one, and added. A store holds at most 10,000 shards, so more are scored into several, one after the other. ``--lost`` is the
share of the replicas whose nodes are lost for a while. Followers: one worker follows a store step by step; all do as it does.
"""

import argparse
import gc
import logging
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from actors.config.models import EngineConfig
from actors.engines.base import TeacherSpec
from actors.format import MIB
from actors.model_source import ModelSource
from actors.monitors.prometheus import TeacherMetrics
from actors.score_store.store import MOST_SHARDS, ScoreStore
from actors.teacher.pool import TeacherPool
from benchmarks.bars import Bar, print_table, report
from benchmarks.scale.followers import Followed, follow
from benchmarks.scale.ray_costs import RayCosts, ray_costs
from benchmarks.scale.world import IDENTITY, ROW_TOKENS, Case, World
from benchmarks.store_scale import own_bytes
from orchestrator.run.run_dir import RunDir
from orchestrator.run.score_identity import ScoringProgress, score_split
from orchestrator.run.scoring import ProgressLine

SMALL, USUAL, LARGE = 8, 256, 800
"""Rows of a shard: as few as 10^6 shards of 8 x 10^9 tokens have, the default's, and as many as 10,000 shards must have."""
BUSY, LOSS = 5.0, 12.0
GROWING = (1, 4, 16)
MEMORY_EVERY = 1000


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    case: Case
    seconds: float
    """On paper."""
    busy: float
    """Seconds in which the driver's thread worked, Ray's part included."""
    in_ray: float
    """Ray's part."""
    calls: int
    share: float
    """Tokens a second, of what the replicas could."""
    own_mib: float
    """By how much the driver's own memory grew at the most."""
    faults: int
    """Shards that were not scored once, but for those that were with a replica when it was lost."""
    again: int
    """Shards that were scored again."""
    share_while_lost: float = 1.0
    """Tokens a second while some were away, of what all replicas could."""

    @property
    def busy_percent(self) -> float:
        """Share of the time in which the driver's thread worked."""
        return 100 * self.busy / self.seconds

    def line(self) -> list[str]:
        """Return the cells of a table."""
        case, each = self.case, 1e6 / self.case.shards
        return [
            f"{case.replicas:,}", f"{case.shards:,}", f"{case.shard_rows:,}", f"{case.shards / self.seconds:,.1f}",
            f"{(self.busy - self.in_ray) * each:.0f}", f"{self.in_ray * each:.0f}", f"{self.busy_percent:.2f} %",
            f"{100 * self.share:.1f} %", f"{self.own_mib:.0f}",
        ]  # fmt: skip


COLUMNS = (
    "replicas", "shards", "rows each", "shards/s", "driver µs a shard", "Ray µs a shard", "busy", "of the replicas' speed",
    "own MiB",
)  # fmt: skip


def drive(case: Case, costs: RayCosts, folder: Path) -> Outcome:
    """Score stores of at most ``MOST_SHARDS`` shards, one after the other, as a run does."""
    world = World(case, costs)
    spec = TeacherSpec(EngineConfig(replicas=case.replicas), ModelSource("on paper"), top_k=2, longest_row=ROW_TOKENS)
    (folder / "run").mkdir()
    gc.collect()
    before, most, faults, again = own_bytes(), 0, 0, 0
    with world.entered():
        live = TeacherMetrics("scale")
        show = ProgressLine("train", RunDir(folder / "run"), live)

        def on_progress(progress: ScoringProgress) -> None:
            nonlocal most
            show(progress)
            if progress.shards_done % MEMORY_EVERY == 0 or progress.shards_done == progress.shards_total:
                with world.outside():
                    most = max(most, own_bytes() - before)

        with TeacherPool(spec, live=live) as pool:
            started, busy, in_ray = world.now, world.busy, world.in_ray
            away_from, away_for = started + 0.25 * case.shards / case.pace, 0.25 * case.shards / case.pace
            if case.lost:
                world.at(away_from, lambda: world.lose(round(case.lost * case.replicas), away_for))
            for number, first in enumerate(range(0, case.shards, MOST_SHARDS)):
                shards = min(MOST_SHARDS, case.shards - first)
                rows = shards * case.shard_rows
                store = ScoreStore.open_or_create(folder / f"store{number}", IDENTITY, rows, case.shard_rows)
                score_split(pool, folder / "rows.arrow", store, on_progress, show.waits)
                with world.outside():
                    assert store.complete and not list(Path(store.place).glob("*.lease"))
                    once = all(world.scored[shard] == 1 for shard in range(shards))
                    faults += 0 if once else sum(world.scored[shard] != 1 for shard in range(shards))
                    faults += sum(world.begun[shard] > 1 + world.cut_off[shard] for shard in range(shards))
                    again += sum(world.begun[shard] > 1 for shard in range(shards))
                    for counter in (world.scored, world.begun, world.cut_off):
                        counter.clear()
                    shutil.rmtree(Path(store.place))
            with world.outside():
                pass
    shutil.rmtree(folder / "run")
    seconds, full = world.now - started, case.replicas * case.speed
    ends, tokens = np.array(world.times), np.array(world.tokens)
    while_lost = 1.0
    if case.lost:  # of each shard that was finished, the part that an engine had in that time
        begins, until = ends - tokens / case.speed, world.whole_again
        overlap = np.minimum(ends, until) - np.maximum(begins, away_from)
        while_lost = overlap.clip(0).sum() / (until - away_from) / case.replicas
    return Outcome(
        case, seconds, world.busy - busy, world.in_ray - in_ray, world.calls, float(tokens.sum() / seconds / full), most / MIB,
        faults, again, float(while_lost),
    )  # fmt: skip


def main() -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, default=256)
    parser.add_argument("--shards", type=int, default=10**6, help="of 8 rows; the larger ones are at most 10,000")
    parser.add_argument("--tokens-per-second", type=float, default=20_000.0, help="of a replica")
    parser.add_argument("--workers", type=int, default=1024, help="who follow the store; 8 rows of a step each")
    parser.add_argument("--lost", type=float, default=0.1, help="share of the replicas that is lost for a while")
    parser.add_argument("--without-ray", action="store_true", help="add nothing for Ray itself")
    parser.add_argument("--folder", type=Path, help="where stores stand, for a while; in memory, no disk is measured")
    options = parser.parse_args()
    costs = RayCosts() if options.without_ray else ray_costs(options.replicas)
    small = Case(options.replicas, options.tokens_per_second, options.shards, SMALL)
    large = replace(small, shards=min(options.shards, MOST_SHARDS), shard_rows=LARGE)
    usual = replace(large, shard_rows=USUAL)
    some = min(options.shards, 2 * MOST_SHARDS)
    growing = [replace(small, replicas=options.replicas * times, shards=some) for times in GROWING]
    logging.getLogger("atkd").setLevel(logging.ERROR)  # a warning for each replica that is lost
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        outcomes = []
        for case in [small, usual, large, *growing, replace(large, lost=options.lost)]:
            outcomes.append(drive(case, costs, folder))
            if not outcomes[1:]:
                print_table(COLUMNS, [])
            print("| " + " | ".join(outcomes[-1].line()) + " |", flush=True)
        followed = [follow(case, 8 * options.workers, folder) for case in (replace(small, shards=some), large)]
    return conclude(options, costs, outcomes, followed)


def conclude(options: argparse.Namespace, costs: RayCosts, outcomes: list[Outcome], followed: list[Followed]) -> int:
    """Print the rest and compare with the bars."""
    first, usual, large, *growing, lost = outcomes
    print(
        f"\nRay: a call and its result {1e6 * costs.call:.0f} µs, and {1e6 * costs.call_beside:.0f} in its own threads; a look "
        f"{1e6 * costs.wait:.0f} µs, and {1e6 * costs.waited:.2f} for each result under way\n"
    )
    print_table(
        ("rows each", "stat/s of a worker", "stat/s of all", "listings/s of all"), [one.line(options.workers) for one in followed]
    )
    most = max(growing, key=lambda one: one.share * one.case.replicas)
    fed, own_hours, ray_hours = most.share * most.case.replicas, (first.busy - first.in_ray) / 3600, first.in_ray / 3600
    print(
        f"\nat {most.case.replicas:,} replicas the driver is busy {most.busy_percent:.0f} % and feeds as many as {fed:,.0f}; "
        f"{own_hours:.2f} h of bookkeeping and {ray_hours:.2f} h of Ray for {first.case.shards:,} "
        f"shards; {lost.again} shards were begun again"
    )
    bars = [
        Bar(f"busy, {one.case.replicas} replicas, shards of {one.case.shard_rows} rows (%)", one.busy_percent, BUSY)
        for one in (first, usual, large)
    ]
    return report([
        *bars,
        Bar("tokens/s lost while a share of the replicas is away (%)", 100 * (1 - lost.share_while_lost), LOSS),
        Bar("shards lost, or scored twice though not under way", sum(one.faults for one in outcomes), 0),
    ])  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
