"""The stage in which responses are written: what is refused before it, what it leaves, and what it says."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from actors.config.rollouts import ResponsesConfig
from actors.examples import ExampleFile, write_examples
from actors.rollouts.base import Prompt, Response, SamplerSpec
from actors.rollouts.writing import Written
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models
from orchestrator.planning.shapes import read_workload
from orchestrator.run.responses import describe, longest_prompt, require_room_for_answers, respond, training_rows
from orchestrator.run.run_dir import RunDir
from orchestrator.run.stages import distillation_task, prepare
from tests.logs import logged
from tests.orchestrator.config.test_run import changed
from tests.worlds import random_examples, tiny_llama

SMALL = (
    "data.source={kind: builtin, rows: 60}", "data.heldout_rows=8", "tokenizer.vocab_size=400", "data.max_tokens=80",
    "scores.rows_per_shard=16", "teacher.engine={kind: transformers, cpus: 0.5}",
)  # fmt: skip


def pretrained(folder: Path, *overrides: str) -> RunConfig:
    """A pair of the same tiny model, which knows 64 positions."""
    model = f"{{kind: pretrained, name: {folder}}}"
    return changed(
        "tokenizer=null", f"teacher={{model: {model}, engine: {{kind: transformers}}}}", f"student={{model: {model}}}",
        f"output={folder.parent / 'runs'}", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("pair") / "model", seed=1)


def room(config: RunConfig, longest: int) -> None:
    require_room_for_answers(config, Models(config, config.run_dir), longest)


def test_an_answer_that_does_not_fit_a_window_is_refused_with_one_that_would(folder: Path) -> None:
    room(pretrained(folder, "responses={writer: teacher, max_new_tokens: 23}"), 40)
    with pytest.raises(ValueError) as refused:
        room(pretrained(folder, "responses={writer: teacher, max_new_tokens: 24}"), 40)
    assert str(refused.value) == (
        "responses.max_new_tokens is 24, the longest prompt has 40 tokens, and the teacher knows 64 positions: "
        "responses.max_new_tokens=23 would do"
    )
    with pytest.raises(ValueError, match=r"longest prompt has 63 tokens, .* 64 positions: a smaller data\.max_tokens would do$"):
        room(pretrained(folder, "responses={writer: student, max_new_tokens: 1}"), 63)


def test_the_student_reads_the_responses_too_whoever_writes_them(folder: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    settings = json.loads((folder / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 32}))
    config = pretrained(folder, "responses={writer: teacher, max_new_tokens: 20}", f"student.model.name={shorter}")
    with pytest.raises(ValueError, match=r"and the student knows 32 positions: responses\.max_new_tokens=11 would do$"):
        room(config, 20)


def test_windows_are_counted_as_the_engine_that_serves_counts_them(folder: Path, tmp_path: Path) -> None:
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    settings = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    (scaled / "config.json").write_text(json.dumps(settings | {"rope_parameters": rope}))
    written = "responses={writer: student, max_new_tokens: 100}"
    room(pretrained(folder, written, f"teacher.model.name={scaled}", f"student.model.name={scaled}"), 20)
    for engine, role in (("teacher.engine.kind=vllm", "teacher"), ("responses.engine={kind: vllm}", "student")):
        with pytest.raises(ValueError, match=rf"and the {role} knows 64 positions: responses\.max_new_tokens=43 would do$"):
            room(pretrained(folder, written, f"teacher.model.name={scaled}", f"student.model.name={scaled}", engine), 20)


def test_a_model_made_from_scratch_is_made_for_the_texts() -> None:
    room(changed("responses={writer: teacher, max_new_tokens: 100000}"), 40)


def test_the_longest_prompt_is_that_of_the_last_turn(tmp_path: Path) -> None:
    rows = random_examples(20, seed=2)
    write_examples(tmp_path / "rows.arrow", rows)
    assert longest_prompt(ExampleFile(tmp_path / "rows.arrow")) == max(len(row.last_prompt) for row in rows)


def test_room_is_looked_at_when_the_rows_are_prepared_and_by_a_plan(folder: Path) -> None:
    source = "data={source: {kind: builtin, rows: 20}, heldout_rows: 2, max_tokens: 60}"
    config = pretrained(folder, source, "responses={writer: teacher, max_new_tokens: 63}", "evaluate.generate_rows=0")
    refusal = r"responses\.max_new_tokens is 63, the longest prompt "
    with pytest.raises(ValueError, match=refusal):
        read_workload(config)
    with RunDir.open(config) as run_dir, pytest.raises(ValueError, match=refusal):
        prepare(config, run_dir, Models(config, run_dir.path))


def test_written_rows_are_learned_from_in_the_place_of_the_datas_own(tmp_path: Path) -> None:
    plain, written = changed(f"output={tmp_path}"), changed(f"output={tmp_path}", "responses={writer: teacher}")
    assert training_rows(plain, tmp_path) == tmp_path / "data" / "train.arrow"
    assert training_rows(written, tmp_path) == tmp_path / "data" / "written.arrow"


@dataclass(frozen=True)
class Counting:
    """Answers with the row's number and the first end, and leaves what it was built from."""

    leaves: Path

    def __call__(self, spec: SamplerSpec) -> "Counting":
        sampling = spec.sampling
        facts = [spec.model.name, sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed, spec.ids_below]
        self.leaves.write_text(json.dumps([*facts, list(spec.ends), spec.longest_prompt, spec.engine.cpus]))
        return Answering(spec.ends[0])

    def sample(self, prompts: Sequence[Prompt]) -> list[Response]:
        raise AssertionError("only what it builds answers")

    def close(self) -> None:
        """Nothing is held."""


class Answering(Counting):
    """Answers."""

    def __init__(self, end: int) -> None:
        self._end = end

    def sample(self, prompts: Sequence[Prompt]) -> list[Response]:
        tokens = [np.array([10 + prompt.row, 10 + prompt.sample, self._end], np.int32) for prompt in prompts]
        return [Response(one, np.zeros(3, np.float32), ended=True) for one in tokens]


@pytest.mark.ray
def test_the_stage_leaves_a_row_for_each_sample_of_each_prompt_and_says_what_they_are_like(
    local_ray: None, tmp_path: Path
) -> None:
    config = changed(
        *SMALL, f"output={tmp_path}", "seed=9",
        "responses={writer: student, samples_per_prompt: 2, max_new_tokens: 5, temperature: 0.8, top_p: 0.9, "
        "engine: {kind: transformers, cpus: 0.25}}",
    )  # fmt: skip
    with RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        run_dir.stage("prepare", lambda: prepare(config, run_dir, models))
        with logged() as lines:
            facts = respond(config, run_dir, models, Counting(tmp_path / "built"))
        own, found = (ExampleFile(run_dir.path / "data" / f"{name}.arrow") for name in ("train", "written"))
        task = distillation_task(config, run_dir.path, models, None)
    assert task.examples == str(run_dir.path / "data" / "written.arrow")
    assert len(found) == 2 * len(own)
    for place in range(len(found)):
        row, prompt = found[place], own[place % len(own)]
        assert row.last_prompt.tolist() == prompt.last_prompt.tolist()
        assert row.targets.tolist()[:2] == [10 + prompt.row, 10 + place // len(own)] and row.row == prompt.row
    model, *sampling, ends, longest, cpus = json.loads((tmp_path / "built").read_text())
    assert model == models.ready("student").name and sampling == [5, 0.8, 0.9, 9, None]
    assert (longest, cpus) == (longest_prompt(own), 0.25) and len(ends) > 0
    assert facts == {"written": {"rows": len(found), "tokens": 3 * len(found), "ended": len(found), "empty": 0, "repeated": 0.0}}
    shards = -(-len(found) // 16)
    counted = [f"respond: shard {number}/{shards}" for number in range(1, shards + 1)]
    assert [line.split(",")[0] for line in lines[:shards]] == counted
    assert lines[shards:] == [
        f"respond: {len(found)} responses by the student, 3.0 tokens each; 100.0 % ended by themselves, 0.0 % are empty, 0.0 % "
        "of their runs of four tokens repeat others"
    ]


def test_responses_are_described_and_many_that_were_cut_are_spoken_of() -> None:
    responses = ResponsesConfig(writer="teacher", max_new_tokens=20)
    assert describe(Written(200, 3100, 100, 3, 25.0), responses) == [
        "200 responses by the teacher, 15.5 tokens each; 50.0 % ended by themselves, 1.5 % are empty, 12.5 % of their runs of "
        "four tokens repeat others"
    ]
    assert describe(Written(200, 4000, 99, 0, 0.0), responses)[1:] == [
        "101 of 200 responses were cut at responses.max_new_tokens 20: the student learns few ends"
    ]
