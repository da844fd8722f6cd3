"""The forward passes of each optimizer step on one worker, the next one made on a thread while the last is learned from."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from actors.config.models import TrainConfig
from actors.dataloader.collator import MicroBatch, collate
from actors.dataloader.sampler import Layout, layout_of
from actors.dataloader.scored_rows import RowBatch, ScoredRows


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of this worker."""

    rows: list[int]
    """The rows of the step that it holds; none where they do not go round."""

    micro_batch: MicroBatch
    """Their tensors on the worker's device, without weights; of one row where there are none, since a worker without rows still
    takes part in the collectives."""


class StepLoader:
    """Reads and collates one pass ahead, over the border of a step too, if the scores of the next are there.

    What is made does not depend on when: no random numbers, no weights, nothing of the loss. Leave it as a context manager: the
    thread ends.

    Args:
        rows: where the rows of each step come from.
        train: how they are cut.
        rank: of this worker.
        world_size: how many there are.
        device: of this worker.
        vocab_size: of the student.
        last_step: beyond which nothing is made ahead.
    """

    def __init__(
        self, rows: ScoredRows, train: TrainConfig, rank: int, world_size: int, device: torch.device, vocab_size: int,
        last_step: int,
    ) -> None:  # fmt: skip
        self._rows, self._train, self._rank, self._world_size = rows, train, rank, world_size
        self._device, self._vocab_size, self._last_step = device, vocab_size, last_step
        self._batches: dict[int, RowBatch] = {}  # of the current step and the next
        self._layouts: dict[int, Layout] = {}
        self._ahead: dict[tuple[int, int], Future[MicroBatch]] = {}  # by step and number of the pass
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step-loader")

    def __enter__(self) -> "StepLoader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def batch(self, step: int) -> RowBatch:
        """Return the rows of a step, which counts from 1; they may still have to be waited for."""
        if step not in self._batches:
            self._batches[step] = self._rows.batch(step)
        return self._batches[step]

    def layout(self, step: int) -> Layout:
        """Return how the rows of a step, which are there, are cut into the passes of each worker."""
        if step not in self._layouts:
            self._layouts[step] = layout_of(self.batch(step).lengths, self._world_size, self._train)
        return self._layouts[step]

    def passes(self, step: int) -> Iterator[Pass]:
        """Yield this worker's passes of a step whose scores are there; every worker has equally many.

        Raises:
            ValueError: if targets or scores are not of the student's vocabulary, or the scores are of other rows.
        """
        self._batches = {known: batch for known, batch in self._batches.items() if known >= step}
        self._layouts = {known: layout for known, layout in self._layouts.items() if known >= step}
        mine = self.layout(step)[self._rank]
        for number, rows in enumerate(mine):
            micro_batch = self._begun(step, number).result()
            del self._ahead[step, number]
            if number + 1 < len(mine):
                self._begun(step, number + 1)
            elif step < self._last_step and self.batch(step + 1).are_scored():
                self._begun(step + 1, 0)
            yield Pass(rows, micro_batch.to(self._device))

    def _begun(self, step: int, number: int) -> "Future[MicroBatch]":
        if (step, number) not in self._ahead:
            rows = self.layout(step)[self._rank][number] or [0]
            self._ahead[step, number] = self._thread.submit(self._collate, self.batch(step), rows)
        return self._ahead[step, number]

    def _collate(self, batch: RowBatch, rows: list[int]) -> MicroBatch:
        micro_batch = collate(batch, rows, self._vocab_size, packed=self._train.packing)
        return micro_batch.pinned() if self._device.type == "cuda" else micro_batch
