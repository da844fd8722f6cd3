"""Which rows a replica reads together: a matter of what is asked, and not of when."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from actors.records import Example
from actors.teacher.router import RouterLimits, ScoreRouter
from tests.fakes import FAKE_VOCAB, fake_examples


class Replica:
    """Answers at once, or when it is told, and notes the rows of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.held: list[Future[None]] | None = None
        self.answer = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self._answer))

    def _answer(self, rows: Sequence[Example]) -> list[Any]:
        self.batches.append([row.row for row in rows])
        done: Future[None] = Future()
        if self.held is None:
            done.set_result(None)
        else:
            self.held.append(done)
        return [*(row.key for row in rows), SimpleNamespace(future=lambda: done)]


def limits(rows_per_batch: int, most_rows: int = 1000) -> RouterLimits:
    return RouterLimits(rows_per_batch, most_rows, longest_row=1000, vocab_size=FAKE_VOCAB, answer_seconds=60.0, run="test")


@pytest.mark.parametrize("late", [False, True], ids=["a replica that waits for rows", "rows that wait for a replica"])
@pytest.mark.parametrize(("rows_per_batch", "sizes"), [(64, [7]), (3, [3, 3, 1]), (1, [1] * 7)])
def test_the_rows_of_a_call_are_batched_alike_whenever_the_replica_comes(
    late: bool, rows_per_batch: int, sizes: list[int]
) -> None:
    async def asked() -> list[list[int]]:
        router, replica = ScoreRouter(limits(rows_per_batch)), Replica()
        if not late:
            await router.put_replica(0, replica)  # type: ignore[arg-type]
        scoring = asyncio.create_task(router.score(fake_examples(7)))
        await asyncio.sleep(0.05)
        if late:
            await router.put_replica(0, replica)  # type: ignore[arg-type]
        assert await scoring == [example.key for example in fake_examples(7)]
        return replica.batches

    batches = asyncio.run(asked())
    assert [len(batch) for batch in batches] == sizes
    assert [row for batch in batches for row in batch] == [example.row for example in fake_examples(7)]


def test_replicas_share_the_rows_of_a_call() -> None:
    async def asked() -> list[list[list[int]]]:
        router, replicas = ScoreRouter(limits(64)), [Replica(), Replica()]
        for number, replica in enumerate(replicas):
            replica.held = []
            await router.put_replica(number, replica)  # type: ignore[arg-type]
        scoring = asyncio.create_task(router.score(fake_examples(8)))
        await asyncio.sleep(0.05)
        for replica in replicas:
            assert replica.held is not None
            for done in replica.held:
                done.set_result(None)
        await scoring
        return [replica.batches for replica in replicas]

    assert [[len(batch) for batch in batches] for batches in asyncio.run(asked())] == [[4], [4]]


def test_more_rows_than_are_taken_at_a_time_make_room_for_each_other() -> None:
    async def asked() -> list[int]:
        router, replica = ScoreRouter(limits(4, most_rows=2)), Replica()
        await router.put_replica(0, replica)  # type: ignore[arg-type]
        assert len(await asyncio.wait_for(router.score(fake_examples(9)), 10)) == 9
        return [len(batch) for batch in replica.batches]

    assert asyncio.run(asked()) == [2, 2, 2, 2, 1]
