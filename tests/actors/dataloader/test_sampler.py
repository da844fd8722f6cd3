"""The same rows in the same steps, for any number of workers and from any point of a run."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config.models import TrainConfig
from actors.dataloader.sampler import StepSampler, Visits, layout_of, steps_in


def take(count: int, rows: int, batch_rows: int, seed: int, store_order_first: bool = True) -> list[np.ndarray]:
    sampler = StepSampler(rows, batch_rows, seed, store_order_first)
    return [sampler.positions(step) for step in range(1, count + 1)]


def test_an_epoch_visits_every_row_once_and_the_last_batch_may_be_smaller() -> None:
    batches = take(6, rows=10, batch_rows=4, seed=1)
    assert [len(positions) for positions in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(10))
    sampler = StepSampler(10, 4, seed=1, store_order_first=True)
    assert [sampler.epochs_after(step) for step in range(1, 7)] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]


def test_the_first_epoch_follows_the_store_and_later_ones_are_permuted_by_seed() -> None:
    in_order = take(4, rows=64, batch_rows=32, seed=1)
    assert np.array_equal(np.concatenate(in_order[:2]), np.arange(64))
    assert np.array_equal(np.concatenate(in_order[2:]), np.random.default_rng([1, 1]).permutation(64))
    permuted = take(2, rows=64, batch_rows=32, seed=1, store_order_first=False)
    assert np.array_equal(np.concatenate(permuted), np.random.default_rng([1, 0]).permutation(64))
    assert not np.array_equal(take(4, rows=64, batch_rows=32, seed=2)[3], in_order[3])


@given(rows=st.integers(1, 40), batch_rows=st.integers(1, 12), steps=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_a_step_has_the_same_rows_whatever_was_asked_before(rows: int, batch_rows: int, steps: list[int]) -> None:
    whole, sampler = take(30, rows, batch_rows, seed=3), StepSampler(rows, batch_rows, seed=3, store_order_first=True)
    for step in steps:
        assert np.array_equal(sampler.positions(step), whole[step - 1])


@given(rows=st.integers(1, 70), world_size=st.integers(1, 9), micro_batch_rows=st.integers(1, 10))
def test_workers_share_a_batch_without_gap_or_overlap_and_run_equally_many_passes(
    rows: int, world_size: int, micro_batch_rows: int
) -> None:
    lengths = np.random.default_rng(rows).integers(1, 50, rows)
    layout = layout_of(lengths, world_size, TrainConfig(micro_batch_rows=micro_batch_rows))
    assert sorted(row for worker in layout for part in worker for row in part) == list(range(rows))
    assert len({len(worker) for worker in layout}) == 1
    assert all(len(part) <= micro_batch_rows for worker in layout for part in worker)


def test_the_rows_of_a_pass_are_of_like_length_and_workers_have_like_work() -> None:
    lengths = np.array([5, 40, 6, 39, 7, 38, 8, 37])
    layout = layout_of(lengths, 2, TrainConfig(micro_batch_rows=2))
    assert [[lengths[part].tolist() for part in worker] for worker in layout] == [[[40, 38], [8, 6]], [[39, 37], [7, 5]]]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), world_size=st.integers(1, 5), tokens=st.integers(1, 120))
def test_passes_of_so_many_tokens_hold_as_many_rows_as_fit(lengths: list[int], world_size: int, tokens: int) -> None:
    layout = layout_of(np.array(lengths), world_size, TrainConfig(micro_batch_tokens=tokens))
    assert sorted(row for worker in layout for part in worker for row in part) == list(range(len(lengths)))
    assert len({len(worker) for worker in layout}) == 1
    for worker in layout:
        passes = [[lengths[row] for row in part] for part in worker if part]
        assert all(len(part) == 1 or len(part) * max(part) <= tokens for part in passes)
        for part, following in itertools.pairwise(passes):
            assert (len(part) + 1) * max(part) > tokens, "one row more would not fit"
            assert min(part) >= max(following)


def test_passes_of_so_many_tokens_are_nearly_equal_where_those_of_rows_are_not() -> None:
    lengths = np.array([100] * 4 + [10] * 40)
    of_rows, of_tokens = (layout_of(lengths, 1, TrainConfig.model_validate(cut))[0] for cut in (
        {"micro_batch_rows": 8}, {"micro_batch_tokens": 400},
    ))  # fmt: skip
    assert [int(lengths[part].sum()) for part in of_tokens] == [400, 400]
    assert [len(part) * int(lengths[part].max()) for part in of_rows] == [800, 80, 80, 80, 80, 40]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (2, 8), (0.5, 2), (1.5, 6), (0.01, 1)])
def test_steps_of_a_run(epochs: float, steps: int) -> None:
    assert steps_in(rows=10, batch_rows=3, epochs=epochs) == steps


def test_steps_agree_with_the_batches() -> None:
    for rows, batch_rows, epochs in itertools.product((1, 7, 64), (1, 5, 100), (1, 3)):
        steps = steps_in(rows, batch_rows, epochs)
        assert steps == epochs * math.ceil(rows / batch_rows)
        assert StepSampler(rows, batch_rows, 0, store_order_first=True).epochs_after(steps) == epochs


def visited_slowly(deals: int, window: int, times: int) -> list[int]:
    """Whose rows each step learns from, window after window."""
    found: list[int] = []
    for first in range(1, deals + 1, window):
        found += list(range(first, min(first + window, deals + 1))) * times
    return found


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize(("deals", "window"), [(6, 1), (6, 2), (7, 3), (5, 8), (1, 1)])
def test_the_deals_of_a_window_are_visited_again_and_again(deals: int, window: int, times: int) -> None:
    visits, expected = Visits(deals, window, times), visited_slowly(deals, window, times)
    assert visits.total_steps == len(expected)
    assert [visits.deal(step) for step in range(1, len(expected) + 1)] == expected
    assert [visits.first_step(deal) for deal in range(1, deals + 1)] == [expected.index(deal) + 1 for deal in range(1, deals + 1)]
    assert [visits.newest(step) for step in range(1, len(expected) + 1)] == [
        max(expected[:step]) for step in range(1, len(expected) + 1)
    ]
