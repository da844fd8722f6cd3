"""Who writes which responses, what is counted of them, and what is left on disk whatever happens to a writer."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.util import placement_group, remove_placement_group

from actors.config.models import EngineConfig
from actors.engines.base import EngineDied
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.rollouts.base import Prompt, Response, SamplerSpec, Sampling, written_row
from actors.rollouts.sampling_actors import WritingFailed
from actors.rollouts.writing import Writer, WritingWork, Written, repeated_share, write_responses, written_rows
from tests.logs import logged
from tests.worlds import random_examples

ROWS, SAMPLES, ROWS_PER_SHARD = 7, 3, 4
END = 0


def response_of(prompt: Prompt) -> Response:
    """Depends on row and sample alone: row 0 is empty, every third is cut, others repeat themselves."""
    tokens = [END] if prompt.row == 0 else [prompt.row, prompt.sample + 1] * (prompt.row + 1) + [END]
    ended = prompt.row % 3 != 2
    tokens = tokens if ended else tokens[:-1]
    return Response(np.array(tokens, np.int32), np.full(len(tokens), -0.5, np.float32), ended)


@dataclass(frozen=True)
class FakeSampler:
    """Answers without a model, and goes wrong as asked. An instance is a factory as well."""

    log: Path | None = None
    """Gets a line for each response."""
    dies_before: int | None = None
    """Row at whose sample 1 the process ends."""
    engine_dies_before: int | None = None
    """Row at whose sample 1 the engine's own process is found gone."""
    device_fails_before: int | None = None
    """Row at whose sample 1 the device is found out of memory."""
    fails_before: int | None = None
    """Row at whose sample 1 an error of the engine is raised."""
    only_once: Path | None = None
    """A file; misbehave only as long as it does not exist, and create it then."""
    refuses: str = ""
    """Words with which the engine refuses to be built."""

    def __call__(self, spec: SamplerSpec) -> "FakeSampler":
        if self.refuses:
            raise ValueError(self.refuses)
        return self

    def sample(self, prompts: Sequence[Prompt]) -> list[Response]:
        for prompt in prompts:
            self._misbehave(prompt)
        if self.log is not None:
            with open(self.log, "a") as file:
                file.writelines(f"{prompt.row}.{prompt.sample}\n" for prompt in prompts)
        return [response_of(prompt) for prompt in prompts]

    def close(self) -> None:
        if self.log is not None:
            with open(self.log.with_name("closed"), "a") as file:
                file.write("closed\n")

    def _misbehave(self, prompt: Prompt) -> None:
        if prompt.sample != 1 or (self.only_once is not None and self.only_once.exists()):
            return
        if self.only_once is not None and prompt.row in (self.dies_before, self.engine_dies_before, self.device_fails_before):
            self.only_once.touch()
        if prompt.row == self.dies_before:
            os._exit(1)
        if prompt.row == self.engine_dies_before:
            raise EngineDied("its process is gone")
        if prompt.row == self.device_fails_before:
            raise torch.OutOfMemoryError("no room")
        if prompt.row == self.fails_before:
            raise RuntimeError("a kernel is missing")


def spec_of(**engine: object) -> SamplerSpec:
    settings = {"kind": "transformers", "cpus": 0.5, "max_restarts": 1, **engine}
    return SamplerSpec(EngineConfig.model_validate(settings), ModelSource("fake"), Sampling(64), (END,), longest_prompt=30)


@pytest.fixture
def work(tmp_path: Path) -> WritingWork:
    write_examples(tmp_path / "train.arrow", random_examples(ROWS, seed=3))
    return WritingWork(tmp_path / "train.arrow", tmp_path / "written", SAMPLES, ROWS_PER_SHARD)


def asked_prompts(work: WritingWork) -> list[Prompt]:
    """What is to be answered, in the order of the written rows: all rows once, then all again."""
    file = ExampleFile(work.prompts)
    return [Prompt(file[row].last_prompt, file.row(row), sample) for sample in range(SAMPLES) for row in range(ROWS)]


def assert_written(work: WritingWork) -> None:
    """Every response is there once, at its place."""
    wanted = [written_row(prompt, response_of(prompt)) for prompt in asked_prompts(work)]
    found = list(written_rows(work))
    assert [(row.key, row.row) for row in found] == [(row.key, row.row) for row in wanted]
    assert not list(work.folder.glob("*.tmp"))


def added_up(parts: Sequence[Written]) -> Written:
    total = Written(0, 0, 0, 0, 0.0)
    for part in parts:
        total += part
    return total


# ---- arithmetic


def test_each_prompt_is_answered_by_each_sample_once_and_samples_stand_apart(work: WritingWork) -> None:
    rows = [work.rows(shard, ROWS) for shard in range(work.shards(ROWS))]
    assert [len(shard) for shard in rows] == [4, 4, 4, 4, 4, 1]
    flat = [one for shard in rows for one in shard]
    assert flat == [(position, sample) for sample in range(SAMPLES) for position in range(ROWS)]
    assert work.path(3).name == "shard-00003.arrow"
    assert WritingWork(work.prompts, work.folder, 1, 4).shards(8) == 2


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),  # no run of four
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 1, 1, 1, 1], 1 / 2),  # twice the same run
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # of five runs the last is the first
        ([7] * 13, 9 / 10),
    ],
)
def test_the_share_of_runs_that_came_before(tokens: list[int], share: float) -> None:
    assert repeated_share(tokens) == pytest.approx(share)
    assert repeated_share(np.array(tokens, np.int32)) == pytest.approx(share)


# ---- the writer, without Ray


def test_a_writer_writes_a_shard_and_says_what_it_is_like(work: WritingWork, tmp_path: Path) -> None:
    work.folder.mkdir()
    log = tmp_path / "log"
    writer = Writer(spec_of(), work, None, FakeSampler(log))
    for shard in range(work.shards(ROWS)):
        written = writer.write(shard)
        assert json.loads(work.path(shard).with_suffix(".json").read_text()) == {
            "rows": written.rows, "tokens": written.tokens, "ended": written.ended, "empty": written.empty,
            "repeated": written.repeated,
        }  # fmt: skip
    # rows 3, 4, 5, 6 with sample 0: row 3 is 3 1 3 1 3 1 3 1 0: six runs, of which three came before
    assert repeated_share(response_of(Prompt(np.array([1], np.int32), 3, 0)).token_ids) == pytest.approx(3 / 6)
    first = Writer(spec_of(), work, None, FakeSampler()).write(0)  # rows 0 to 3: [0], 4 + 1, 6, 8 + 1 tokens
    assert (first.rows, first.tokens, first.ended, first.empty) == (4, 1 + 5 + 6 + 9, 3, 1)
    # 1 1 1 1 0: none of two; 2 1 2 1 2 1: one of three; row 3: three of six
    assert first.repeated == pytest.approx(0 + 1 / 3 + 3 / 6)
    assert_written(work)
    writer.close()
    writer.close()
    assert log.with_name("closed").read_text().split() == ["closed"]


def test_a_shard_that_is_there_is_whole(work: WritingWork) -> None:
    work.folder.mkdir()
    (work.folder / "shard-00001.arrow").mkdir()  # a place where no file can be written
    with pytest.raises(OSError, match="shard-00001"):
        Writer(spec_of(), work, None, FakeSampler()).write(1)
    assert (work.folder / "shard-00001.json").is_file(), "the numbers come first"


# ---- writers in Ray


@pytest.mark.ray
@pytest.mark.parametrize("replicas", [1, 2, pytest.param("auto", marks=pytest.mark.drill)])
def test_all_is_written_once_and_a_second_call_writes_nothing(
    local_ray: None, work: WritingWork, tmp_path: Path, replicas: int | str
) -> None:
    log = tmp_path / "log"
    parts = list(write_responses(spec_of(replicas=replicas), work, tmp_path / "logs", FakeSampler(log)))
    assert_written(work)
    total = added_up(parts)
    responses = [response_of(prompt) for prompt in asked_prompts(work)]
    assert (total.rows, total.tokens) == (ROWS * SAMPLES, sum(len(response.token_ids) for response in responses))
    assert (total.ended, total.empty) == (sum(response.ended for response in responses), SAMPLES)
    assert sorted(log.read_text().split()) == sorted(f"{row}.{sample}" for row in range(ROWS) for sample in range(SAMPLES))
    assert 1 <= len(log.with_name("closed").read_text().split()) <= (replicas if isinstance(replicas, int) else 6)
    again = added_up(list(write_responses(spec_of(), work, tmp_path / "logs", FakeSampler(refuses="nobody is asked"))))
    assert (again.rows, again.tokens, again.ended, again.empty) == (total.rows, total.tokens, total.ended, total.empty)
    assert again.repeated == pytest.approx(total.repeated)


@pytest.mark.ray
def test_only_what_is_missing_is_written(local_ray: None, work: WritingWork, tmp_path: Path) -> None:
    work.folder.mkdir()
    for shard in (0, 2, 5):
        Writer(spec_of(), work, None, FakeSampler()).write(shard)
    work.path(5).with_suffix(".json").with_suffix(".arrow").unlink()  # as if the process had ended between the two files
    log = tmp_path / "log"
    list(write_responses(spec_of(), work, tmp_path / "logs", FakeSampler(log)))
    missing = [place for shard in (1, 3, 4, 5) for place in work.rows(shard, ROWS)]
    assert sorted(log.read_text().split()) == sorted(f"{row}.{sample}" for row, sample in missing)
    assert_written(work)


@pytest.mark.ray
@pytest.mark.parametrize("harm", ["dies_before", "engine_dies_before", "device_fails_before"])
def test_a_writer_that_dies_once_is_started_again_and_nothing_is_lost_or_doubled(
    local_ray: None, work: WritingWork, tmp_path: Path, harm: str
) -> None:
    died = tmp_path / "died"
    sampler = FakeSampler(only_once=died, **{harm: 5})  # type: ignore[arg-type]
    parts = list(write_responses(spec_of(), work, tmp_path / "logs", sampler))
    assert died.exists()
    assert added_up(parts).rows == ROWS * SAMPLES
    assert_written(work)


@pytest.mark.ray
def test_a_writer_that_always_dies_is_given_up_and_what_it_wrote_is_kept(
    local_ray: None, work: WritingWork, tmp_path: Path
) -> None:
    message = rf"^a writer of responses died 2 times \(.+\); what it printed is in {re.escape(str(tmp_path / 'logs'))}$"
    with pytest.raises(WritingFailed, match=message):
        list(write_responses(spec_of(), work, tmp_path / "logs", FakeSampler(engine_dies_before=5)))
    assert "EngineDied: its process is gone" in (tmp_path / "logs" / "writer-0.log").read_text()
    there = [shard for shard in range(work.shards(ROWS)) if work.path(shard).exists()]
    assert there == [0, 1, 2]  # sample 1 of row 5 is in shard 3
    list(write_responses(spec_of(), work, tmp_path / "logs", FakeSampler()))
    assert_written(work)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (FakeSampler(fails_before=5), "RuntimeError: a kernel is missing"),
        (FakeSampler(refuses="the window is too small"), "ValueError: the window is too small"),
    ],
)
def test_an_error_of_the_engine_arrives_as_it_was_raised(
    local_ray: None, work: WritingWork, tmp_path: Path, sampler: FakeSampler, words: str
) -> None:
    with pytest.raises(WritingFailed, match=rf"^a writer of responses failed: {words}$"):
        list(write_responses(spec_of(), work, tmp_path / "logs", sampler))


@pytest.mark.ray
def test_more_writers_than_find_room_are_not_begun(local_ray: None, work: WritingWork, tmp_path: Path) -> None:
    others = placement_group([{"CPU": 3.0}])
    assert others.wait(60)
    try:
        with logged() as lines:
            list(write_responses(spec_of(replicas=4), work, tmp_path / "logs", FakeSampler()))
    finally:
        remove_placement_group(others)
    assert lines == ["respond: 4 writers are wanted, and there is room for 2 now"]
    assert_written(work)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["writer-0.log", "writer-1.log"]


@pytest.mark.ray
def test_writers_that_no_node_can_hold_are_refused_by_their_section(
    local_ray: None, work: WritingWork, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^responses\.engine\.cpus 5: the largest node has 4 CPUs; cpus 4 would do$"):
        list(write_responses(spec_of(cpus=5), work, tmp_path / "logs", FakeSampler(), "responses.engine"))
