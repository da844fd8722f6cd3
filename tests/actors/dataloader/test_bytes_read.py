"""What a worker reads of a store: the scores of its own rows, and of all others what ranks their targets."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors.config.models import TrainConfig
from actors.dataloader.collator import collate
from actors.dataloader.sampler import StepSampler, layout_of
from actors.dataloader.scored_rows import StoredRows
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile, write_examples
from actors.records import Example, TeacherScores, example_key, tail_logmass
from actors.score_store import shard_files
from actors.score_store.store import ScoreStore
from actors.storage.folder import DiskFolder
from losses.config import AtkdLoss
from losses.loss_state import LossState

RANKS, ROWS, TARGETS, TOP_K, VOCAB = 1024, 4096, 120, 16, 1000
ATKD = AtkdLoss(kind="atkd")
TRAIN = TrainConfig(batch_rows=2048, micro_batch_rows=2, first_epoch="permuted")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("bytes"), np.random.default_rng(0)
    examples, scores = [], []
    for row in range(ROWS):
        token_ids = generator.integers(0, VOCAB, TARGETS + 1).astype(np.int32)
        mask = np.arange(TARGETS + 1) > 0
        examples.append(Example(token_ids, mask, example_key(token_ids, mask), row))
        logprobs = -np.sort(generator.uniform(3, 12, (TARGETS, TOP_K + 1)), axis=1).astype(np.float32)
        ids = (token_ids[1:, None] + np.arange(1, TOP_K + 1)).astype(np.int32) % VOCAB
        tail = tail_logmass(logprobs[:, 0], logprobs[:, 1:])
        scores.append(TeacherScores(examples[-1].key, logprobs[:, 0], ids, logprobs[:, 1:], tail))
    write_examples(folder / "train.arrow", examples)
    store = ScoreStore.open_or_create(folder / "store", {"top_k": TOP_K, "vocab_size": VOCAB}, ROWS, 256)
    for shard in store.missing_shards():
        here = slice(store.positions(shard)[0], store.positions(shard)[-1] + 1)
        store.write_shard(shard, examples[here], scores[here])
    return folder


@pytest.mark.parametrize("rank", [0, 517, RANKS - 1])
def test_a_rank_of_a_thousand_reads_its_own_rows_and_the_column(
    folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {"rows": 0, "indexes": 0}
    real_range, real_index = DiskFolder.read_range, shard_files.ShardIndex

    def counted_range(folder: DiskFolder, name: str, start: int, end: int) -> bytes:
        content = real_range(folder, name, start, end)
        read["rows"] += len(content)
        return content

    def counted_index(buffer: pa.Buffer) -> shard_files.ShardIndex:
        read["indexes"] += buffer.size
        return real_index(buffer)

    monkeypatch.setattr(DiskFolder, "read_range", counted_range)
    monkeypatch.setattr(shard_files, "ShardIndex", counted_index)
    examples, store = ExampleFile(folder / "train.arrow"), ScoreStore(folder / "store")
    rows = StoredRows(examples, store, TOP_K, StepSampler(ROWS, TRAIN.batch_rows, seed=0, store_order_first=False))
    weights = StepWeights(ATKD, 0, store)
    own = 0
    for step in range(1, 1 + ROWS // TRAIN.batch_rows):
        batch = rows.batch(step)
        layout = layout_of(batch.lengths, RANKS, TRAIN)
        of_step = weights.of_step(batch, layout, step, LossState.first(ATKD))
        for micro_batch in layout[rank]:
            collate(batch, micro_batch, VOCAB, of_step)
            own += len(micro_batch) * TARGETS * (4 * TOP_K + 8)
    column = 4 * ROWS * TARGETS
    assert read["rows"] == own
    assert own + column < read["rows"] + read["indexes"] <= 1.2 * (own + column)
    whole = sum(path.stat().st_size for path in Path(store.place).iterdir())
    assert read["rows"] + read["indexes"] < whole / 10
