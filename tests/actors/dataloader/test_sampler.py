"""The same rows in the same steps, for any number of workers and from any point of a run."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.dataloader.sampler import GlobalBatch, SamplerState, global_batches, micro_batches, steps_in


def take(count: int, rows: int, batch_rows: int, state: SamplerState, store_order_first: bool = True) -> list[GlobalBatch]:
    return list(itertools.islice(global_batches(rows, batch_rows, state, store_order_first), count))


def test_an_epoch_visits_every_row_once_and_the_last_batch_may_be_smaller() -> None:
    batches = take(6, rows=10, batch_rows=4, state=SamplerState(seed=1))
    assert [len(batch.positions) for batch in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(np.concatenate([batch.positions for batch in epoch])) == list(range(10))
    assert batches[2].after == SamplerState(seed=1, epoch=1, consumed=0)


def test_the_first_epoch_follows_the_store_and_later_ones_are_permuted_by_seed() -> None:
    in_order = take(4, rows=64, batch_rows=32, state=SamplerState(seed=1))
    assert np.array_equal(np.concatenate([batch.positions for batch in in_order[:2]]), np.arange(64))
    assert not np.array_equal(np.concatenate([batch.positions for batch in in_order[2:]]), np.arange(64))
    permuted = take(2, rows=64, batch_rows=32, state=SamplerState(seed=1), store_order_first=False)
    assert not np.array_equal(np.concatenate([batch.positions for batch in permuted]), np.arange(64))
    other_seed = take(4, rows=64, batch_rows=32, state=SamplerState(seed=2))
    assert not np.array_equal(other_seed[3].positions, in_order[3].positions)


@given(rows=st.integers(1, 40), batch_rows=st.integers(1, 12), stop=st.integers(0, 20))
def test_going_on_from_any_state_gives_the_batches_of_the_run_that_was_not_stopped(rows: int, batch_rows: int, stop: int) -> None:
    whole = take(stop + 5, rows, batch_rows, SamplerState(seed=3))
    state = whole[stop - 1].after if stop else SamplerState(seed=3)
    for expected, found in zip(whole[stop:], take(5, rows, batch_rows, state), strict=True):
        assert np.array_equal(expected.positions, found.positions)
        assert expected.after == found.after


@given(rows=st.integers(1, 70), world_size=st.integers(1, 9), micro_batch_rows=st.integers(1, 10))
def test_workers_share_a_batch_without_gap_or_overlap_and_run_equally_many_passes(
    rows: int, world_size: int, micro_batch_rows: int
) -> None:
    lengths = np.random.default_rng(rows).integers(1, 50, rows)
    layout = [micro_batches(lengths, rank, world_size, micro_batch_rows) for rank in range(world_size)]
    assert sorted(row for worker in layout for part in worker for row in part) == list(range(rows))
    assert len({len(worker) for worker in layout}) == 1
    assert all(len(part) <= micro_batch_rows for worker in layout for part in worker)


def test_the_rows_of_a_pass_are_of_like_length_and_workers_have_like_work() -> None:
    lengths = np.array([5, 40, 6, 39, 7, 38, 8, 37])
    layout = [micro_batches(lengths, rank, world_size=2, micro_batch_rows=2) for rank in range(2)]
    assert [[lengths[part].tolist() for part in worker] for worker in layout] == [[[40, 38], [8, 6]], [[39, 37], [7, 5]]]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (2, 8), (0.5, 2), (1.5, 6), (0.01, 1)])
def test_steps_of_a_run(epochs: float, steps: int) -> None:
    assert steps_in(rows=10, batch_rows=3, epochs=epochs) == steps


def test_steps_agree_with_the_batches() -> None:
    for rows, batch_rows, epochs in itertools.product((1, 7, 64), (1, 5, 100), (1, 3)):
        batches = take(steps_in(rows, batch_rows, epochs), rows, batch_rows, SamplerState(seed=0))
        assert batches[-1].after == SamplerState(seed=0, epoch=epochs, consumed=0)
        assert len(batches) == epochs * math.ceil(rows / batch_rows)
