"""The way of ``benchmarks.prepare`` that the orchestrator does not go: Ray Data between the same reading and writing."""

import pickle
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from transformers import PreTrainedTokenizerBase

from actors.examples import write_batches
from orchestrator.config.data import DataConfig
from orchestrator.data.dataset import ROWS_AT_ONCE, PreparedRows, TrainingRows, prepare_rows
from orchestrator.data.mixture import read_splits


class RayDataWork:
    """What an actor of Ray Data makes of a row that holds packed rows."""

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._prepare = partial(prepare_rows, data=data, tokenizer=tokenizer)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Render and tokenize them."""
        return {"prepared": [pickle.dumps(self._prepare(pickle.loads(packed))) for packed in batch["packed"]]}


class ByRayData(TrainingRows):
    """Training rows that Ray Data prepares, in their order."""

    def _prepared(self, on_cluster: bool) -> Generator[PreparedRows]:
        from ray.data import ActorPoolStrategy, DataContext, from_arrow_refs  # slow to import, and only this way needs it

        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        parts = [ray.put(pa.table({"packed": [pickle.dumps(packed)]})) for packed in self.rows.packed(ROWS_AT_ONCE)]
        actors = ActorPoolStrategy(min_size=1, max_size=self.data.cluster_tasks)
        given: dict[str, Any] = {"compute": actors, "fn_constructor_args": (self.data, self.tokenizer)}
        for row in from_arrow_refs(parts).map_batches(RayDataWork, batch_size=1, **given).iter_rows():
            yield pickle.loads(row["prepared"])


def prepare_by_ray_data(data: DataConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Read, split, render, tokenize and write the training rows; the held-out ones are a small part of them."""
    folder.mkdir(parents=True)
    rows, _ = read_splits(data)
    write_batches(folder / "train.arrow", ByRayData(rows, data, tokenizer, frozenset()).batches(on_cluster=True))
