"""Responses to all prompts of a file, written once by Ray actors, a shard of rows at a time."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import ray
from ray.util import ActorPool

from actors.examples import ExampleFile, write_examples
from actors.files import write_atomically
from actors.handles import RemoteMethod
from actors.placement import read_nodes, replica_request, settled_places
from actors.records import Example
from actors.rollouts.base import Prompt, Response, Sampler, SamplerFactory, SamplerSpec, written_row
from actors.rollouts.build import build_sampler
from actors.rollouts.sampling_actors import CLOSE_SECONDS, actor_options, failures_in_words, process_ends_with_engine
from actors.room import require_room
from actors.teacher.replica import print_into

logger = logging.getLogger("atkd")

NGRAM = 4


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, in numbers."""

    rows: int
    """Responses."""
    tokens: int
    """Tokens of them."""
    ended: int
    """How many ended by themselves."""
    empty: int
    """How many hold their end and nothing else."""
    repeated: float
    """Share of their runs of four tokens that occurred in the same response before, added up over the responses."""

    def __add__(self, other: "Written") -> "Written":
        return Written(*(mine + theirs for mine, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True, slots=True)
class WritingWork:
    """What is to be written."""

    prompts: Path
    """File of the rows whose last prompts are answered."""
    folder: Path
    """Where the shards of responses go."""
    samples_per_prompt: int
    """Rows made of each prompt; those of one prompt stand apart, so that a step seldom has two."""
    rows_per_shard: int
    """Rows of a shard."""

    def rows(self, shard: int, count: int) -> list[tuple[int, int]]:
        """Return position of the prompt and number of the sample for each row of a shard; ``count`` prompts are there."""
        first, last = shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, count * self.samples_per_prompt)
        return [(row % count, row // count) for row in range(first, last)]

    def shards(self, count: int) -> int:
        """Return how many shards there are for ``count`` prompts."""
        return -(-count * self.samples_per_prompt // self.rows_per_shard)

    def path(self, shard: int) -> Path:
        """Return the file of a shard; it is there once the shard is written."""
        return self.folder / f"shard-{shard:05d}.arrow"


class WriterHandle(Protocol):
    """Handle of the actor that a ``Writer`` becomes."""

    @property
    def write(self) -> RemoteMethod[[int], Written]:
        """See ``Writer.write``."""
        ...

    @property
    def close(self) -> RemoteMethod[[], None]:
        """See ``Writer.close``."""
        ...


class Writer:
    """One engine that writes shards of responses. Becomes a Ray actor."""

    def __init__(
        self, spec: SamplerSpec, work: WritingWork, log: Path | None, sampler_factory: SamplerFactory = build_sampler
    ) -> None:
        if log is not None:
            print_into(log)
        self._spec, self._work, self._sampler_factory = spec, work, sampler_factory
        self._prompts = ExampleFile(work.prompts)
        self._sampler: Sampler | None = None

    def write(self, shard: int) -> Written:
        """Write the responses of a shard, in one rename; return what they are like.

        The engine is built by the first call and not by the constructor, so that its error arrives as it was raised.
        """
        prompts = [
            Prompt(self._prompts[position].last_prompt, self._prompts.row(position), sample)
            for position, sample in self._work.rows(shard, len(self._prompts))
        ]
        responses = self._responses(prompts)
        rows = [written_row(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        written = Written(
            rows=len(rows),
            tokens=sum(len(response.token_ids) for response in responses),
            ended=sum(response.ended for response in responses),
            empty=sum(response.ended and len(response.token_ids) == 1 for response in responses),
            repeated=sum(repeated_share(response.token_ids) for response in responses),
        )
        path = self._work.path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".json"), json.dumps(asdict(written)).encode())
        write_examples(path, rows)  # last: a shard that is there is whole
        return written

    def close(self) -> None:
        """Give the device back."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def _responses(self, prompts: Sequence[Prompt]) -> list[Response]:
        with process_ends_with_engine():
            if self._sampler is None:
                self._sampler = self._sampler_factory(self._spec)
            return self._sampler.sample(prompts)


def write_responses(
    spec: SamplerSpec, work: WritingWork, logs: Path, sampler_factory: SamplerFactory = build_sampler,
    section: str = "teacher.engine",
) -> Iterator[Written]:
    """Write all shards that are not there yet; yield what each is like, those found first.

    As many actors write as find room, and no more than the engine's ``replicas``. One that dies is started again by Ray, and its
    shard written anew, ``max_restarts`` times. ``section`` is where the configuration speaks of the engine.

    Raises:
        WritingFailed: if one died more often; or with the engine's own error.
        ValueError: if the nodes could not hold the writers even when they are free.
    """  # fmt: skip
    work.folder.mkdir(parents=True, exist_ok=True)
    shards = range(work.shards(len(ExampleFile(work.prompts))))
    found = [shard for shard in shards if work.path(shard).exists()]
    for shard in found:
        yield Written(**json.loads(work.path(shard).with_suffix(".json").read_text()))
    missing = sorted(set(shards) - set(found))
    if not missing:
        return
    engine, need = spec.engine, replica_request(spec.engine, section)
    wanted = len(missing) if engine.replicas == "auto" else min(engine.replicas, len(missing))
    require_room(read_nodes(), need, 1 if engine.replicas == "auto" else wanted)
    count = max(1, min(wanted, settled_places(need, wanted)))  # one without room would hold its shard and wait for the others
    if count < wanted and engine.replicas != "auto":
        logger.warning(f"respond: {wanted} writers are wanted, and there is room for {count} now")
    actor_class = ray.remote(Writer).options(**actor_options(engine))
    writers = [
        actor_class.remote(spec, work, logs / f"writer-{number}.log", sampler_factory) for number in range(count)
    ]
    try:
        with failures_in_words("a writer of responses", engine, logs):
            pool = ActorPool(writers)
            yield from pool.map_unordered(lambda writer, shard: writer.write.remote(shard), missing)
            ray.wait([writer.close.remote() for writer in writers], num_returns=count, timeout=CLOSE_SECONDS)
    finally:
        for writer in writers:
            ray.kill(writer)


def written_rows(work: WritingWork) -> Iterator[Example]:
    """Yield the rows of all shards, in their order."""
    for shard in range(work.shards(len(ExampleFile(work.prompts)))):
        file = ExampleFile(work.path(shard))
        yield from (file[position] for position in range(len(file)))


def repeated_share(token_ids: np.ndarray | Sequence[int]) -> float:
    """Return the share of a response's runs of four tokens that occurred in it before; 0 where there are none."""
    tokens = [int(token) for token in token_ids]
    runs = Counter(zip(*(tokens[start:] for start in range(NGRAM)), strict=False))
    return 1 - len(runs) / runs.total() if runs else 0.0
