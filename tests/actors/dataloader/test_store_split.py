"""Which targets are easy among those of a whole store, against a sort of all of them."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from actors.dataloader.scored_rows import all_rows
from actors.dataloader.step_weights import StepWeights
from actors.dataloader.store_split import split_store
from actors.examples import ExampleFile, write_examples
from actors.records import TeacherScores, tail_logmass
from actors.score_store.store import ScoreStore
from losses.config import AtkdLoss
from losses.loss_state import LossState
from losses.token_weights import split_easy
from tests.worlds import VOCAB, random_examples, scored_world

ROWS, ROWS_PER_SHARD = 50, 4
RATIOS = (0.0, 0.004, 0.3, 0.5, 0.77, 1.0)


def tied_world(folder: Path) -> ScoreStore:
    """A store whose targets have one of four uncertainties, none at all among them."""
    folder.mkdir()
    examples, generator = random_examples(ROWS, seed=0), np.random.default_rng(1)
    write_examples(folder / "train.arrow", examples)
    scores = []
    for example in examples:
        unsure = generator.choice([0.0, 1e-9, 0.25, 0.5], len(example.targets)).astype(np.float32)
        logprobs = np.log(np.maximum(unsure[:, None] * np.array([0.75, 0.25]), [1e-60, 1e-61])).astype(np.float32)
        target = np.log1p(-unsure)
        ids = (example.targets[:, None] + np.array([1, 2])) % VOCAB
        scores.append(TeacherScores(example.key, target, ids.astype(np.int32), logprobs, tail_logmass(target, logprobs)))
    store = ScoreStore.open_or_create(folder / "store", {"top_k": 2, "vocab_size": VOCAB}, ROWS, ROWS_PER_SHARD)
    for shard in range(store.shard_count):
        here = store.positions(shard)
        store.write_shard(shard, examples[here.start : here.stop], scores[here.start : here.stop])
    return store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ScoreStore]:
    """Without their scores: the indexes are enough."""
    folder = tmp_path_factory.mktemp("stores")
    found = {"tied": tied_world(folder / "tied"), "spread": scored_world(folder / "spread", ROWS, 8, ROWS_PER_SHARD)[1]}
    for path in folder.rglob("*.rows"):
        path.unlink()
    return found


def values_of(store: ScoreStore) -> list[np.ndarray]:
    return [store.uncertainty_at(position) for position in range(store.rows)]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("split", ["uncertainty", "inverted"])
@pytest.mark.parametrize("kind", ["tied", "spread"])
def test_the_easy_targets_of_a_store_are_the_first_of_all_in_order(
    stores: dict[str, ScoreStore], kind: str, split: Literal["uncertainty", "inverted"], ratio: float
) -> None:
    store = stores[kind]
    values = np.concatenate(values_of(store)).tolist()
    assert len(set(values)) == 4 or kind == "spread"
    sign = -1 if split == "inverted" else 1
    first = sorted(range(len(values)), key=lambda place: (sign * values[place], place))[: round(ratio * len(values))]
    found = split_store(store, AtkdLoss(kind="atkd", scope="dataset", split=split, easy_ratio=ratio), seed=0)
    easy = torch.cat([found.easy(position) for position in range(store.rows)])
    assert easy.dtype == torch.bool and np.flatnonzero(easy).tolist() == sorted(first)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("split", ["uncertainty", "inverted", "random"])
def test_a_store_is_split_as_its_targets_together_would_be(
    stores: dict[str, ScoreStore], split: Literal["uncertainty", "inverted", "random"], ratio: float
) -> None:
    loss = AtkdLoss(kind="atkd", scope="dataset", split=split, easy_ratio=ratio)
    for store in stores.values():
        values = values_of(store)
        wanted = split_easy(torch.from_numpy(np.concatenate(values)), loss, seed=7).split([len(row) for row in values])
        found = split_store(store, loss, seed=7)
        assert all(torch.equal(found.easy(position), row) for position, row in enumerate(wanted))


def test_a_step_weighs_its_targets_by_the_split_of_the_store(tmp_path: Path) -> None:
    path, store = scored_world(tmp_path / "world", ROWS, 8, ROWS_PER_SHARD)
    loss = AtkdLoss(kind="atkd", scope="dataset", easy_ratio=0.3)
    batch = all_rows(ExampleFile(path), store, 8)
    weigher = StepWeights(loss, 0, store)
    assert weigher.wait_for_scores(batch, timeout_seconds=0.0) == 0.0
    weights = weigher.of_step(batch, [[list(range(ROWS))]], 1, LossState.first(loss))
    easy = split_easy(torch.from_numpy(np.concatenate(values_of(store))), loss, seed=0)
    assert torch.equal(torch.cat([row.easy for row in weights]), easy)
    store.discard_shard(3)
    assert weigher.wait_for_scores(batch, timeout_seconds=0.0) == 0.0, "it was looked at once"
