"""The doctor: sound teachers pass, and each fault fails the check that is there for it, with a word on what to do."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import Whitespace
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from actors.config.models import DType
from actors.engines.base import EngineFactory, TeacherSpec
from actors.engines.build import build_engine
from actors.engines.transformers import TransformersEngine
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, example_key
from actors.score_store.store import ScoreStore
from actors.student.self_distillation import SelfDistillationCheck, measure
from actors.teacher.replica import TeacherReplica
from actors.teacher.replica_set import TeacherFailed
from orchestrator.cli import main
from orchestrator.cluster.run_copies import PassingFolder
from orchestrator.config.load import load_config
from orchestrator.config.run import RunConfig
from orchestrator.doctor.checks import check_scores
from orchestrator.doctor.doctor import diagnose, measure_served, spread_over_lengths
from orchestrator.models.models import ROLES, Models
from orchestrator.run.score_parity import TOLERANCES, Finding
from tests.fakes import FakeTeacher, fake_spec
from tests.faulty_engines import TOP_K, CrowdedEngine, RepeatingEngine, Serves, ShiftedEngine, SwappingEngine
from tests.worlds import LONGEST, VOCAB, random_examples, tiny_llama, word_tokenizer

OF_THE_RUN = ["devices", "tokens", "rows", "ends", "export", "attention"]
CHECKS = ["attention", "scores", "batch", "raw", "served", "loss", "teacher"]


@dataclass(frozen=True)
class World:
    """Models in folders, and rows that the model ``teacher`` likes."""

    folder: Path
    rows: list[Example]

    def spec(self, model: str = "teacher", dtype: DType = "float32") -> TeacherSpec:
        base = fake_spec(TOP_K, dtype=dtype)
        return replace(base, model=ModelSource(str(self.folder / model)), longest_row=LONGEST)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("doctor")
    tiny_llama(folder / "teacher", seed=1, hidden_size=32, layers=2, tied=False)
    tiny_llama(folder / "other", seed=2, hidden_size=32, layers=2, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    rows = []
    for row in random_examples(8, seed=3):
        token_ids = row.token_ids.copy()
        for position in row.target_positions[::2]:  # so that the loss is below that of guessing
            with torch.no_grad():
                token_ids[position] = int(
                    model(torch.from_numpy(token_ids[None, :position].astype(np.int64))).logits[0, -1].argmax()
                )
        rows.append(Example(token_ids, row.loss_mask, example_key(token_ids, row.loss_mask), row.row))
    with torch.no_grad():
        model.lm_head.weight.div_(1.25)
    model.save_pretrained(folder / "hot")
    return World(folder, rows)


def measured(
    world: World, folder: Path, engine_factory: EngineFactory, spec: TeacherSpec | None = None, attention: str = "auto"
) -> SelfDistillationCheck:
    """What ``measure_served`` does, in this process; ``attention`` is the reference's."""
    spec = spec or world.spec()
    write_examples(folder / "rows.arrow", world.rows)
    for name, rows_per_shard in (("alone", 1), ("together", len(world.rows))):
        identity = {"top_k": TOP_K, "vocab_size": VOCAB}
        store = ScoreStore.open_or_create(folder / name, identity, len(world.rows), rows_per_shard)
        replica = TeacherReplica(spec, engine_factory)
        replica.start()
        for shard in store.missing_shards():
            replica.score_shard(folder / "rows.arrow", Path(store.place), shard)
    teacher = replace(world.spec().model, attention=attention)
    return measure(teacher, str(folder / "rows.arrow"), str(folder / "alone"), str(folder / "together"))


def judged(found: SelfDistillationCheck, dtype: DType = "float32", student_vocab: int = VOCAB) -> list[Finding]:
    return check_scores(found, TOLERANCES[dtype], VOCAB, student_vocab)


def the_failed(findings: list[Finding]) -> Finding:
    """Return the one finding that failed."""
    (failed,) = [finding for finding in findings if finding.state == "FAILED"]
    return failed


# ---- measuring and judging, without Ray


def test_a_sound_engine_passes_every_check_far_from_its_bounds(world: World, tmp_path: Path) -> None:
    found = measured(world, tmp_path, build_engine)
    findings = judged(found)
    assert [finding.check for finding in findings] == CHECKS
    assert {finding.state for finding in findings} == {"ok"}
    assert found.largest_target_error < 5e-5 and abs(found.slope - 1) < 1e-3 and abs(found.self_divergence) < 3e-4
    assert min(found.error_one_earlier, found.error_one_later) > 0.1  # a shift could be told


def test_an_engine_in_sixteen_bits_passes_its_own_bounds_and_not_those_of_float32(world: World, tmp_path: Path) -> None:
    found = measured(world, tmp_path, build_engine, world.spec(dtype="bfloat16"))
    assert {finding.state for finding in judged(found, "bfloat16")} == {"ok"}
    failed = the_failed([finding for finding in judged(found, "float32") if finding.check != "batch"])
    assert failed.check == "served" and "computed less exactly" in failed.advice and "dtype=float32" in failed.advice


@pytest.mark.parametrize(
    ("fault", "check", "advice", "follow"),
    [
        ("hot", "raw", "divides logits by about 1.25, a temperature", {"served", "loss"}),
        (ShiftedEngine, "served", "the predictions one position after the right one", {"raw", "loss", "teacher"}),
        ("other", "served", "serves another model than teacher.model", {"raw", "loss", "teacher"}),
        (SwappingEngine, "loss", "a student would be taught something else", {"raw"}),
        (RepeatingEngine, "loss", "no student can be taught this", {"raw"}),
        (CrowdedEngine, "batch", "set teacher.engine.rows_per_call=1", set()),
    ],
)  # fmt: skip
def test_a_fault_fails_its_own_check_and_no_other(
    world: World, tmp_path: Path, fault: Any, check: str, advice: str, follow: set[str]
) -> None:
    found = measured(world, tmp_path, Serves(world.folder / fault) if isinstance(fault, str) else fault)
    findings = judged(found)
    failed = the_failed(findings)
    assert failed.check == check and advice in failed.advice
    unclear = {finding.check for finding in findings if finding.state == "unclear"}
    assert unclear <= follow and (follow - unclear <= {"teacher"})


def sharpened(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """An attention that is wrong and says nothing."""
    return sdpa_attention_forward(module, 1.5 * query, *args, **kwargs)


@pytest.mark.parametrize(("served_by", "said"), [("auto", "the engine is right"), ("sharpened", "the engine serves the same")])
def test_where_the_reference_is_off_the_engine_is_not_blamed(world: World, tmp_path: Path, served_by: str, said: str) -> None:
    AttentionInterface.register("sharpened", sharpened)
    spec = world.spec()
    served = replace(spec, model=replace(spec.model, attention=served_by))
    findings = judged(measured(world, tmp_path, build_engine, served, attention="sharpened"))
    failed = the_failed(findings)
    assert failed.check == "attention" and said in failed.advice and "teacher.model.attention=eager" in failed.advice
    assert {finding.check for finding in findings if finding.state == "unclear"} <= {"raw", "served", "loss"}


def test_the_rounding_of_stored_scores_is_not_taken_for_the_batch(world: World, tmp_path: Path) -> None:
    """The least difference may take a stored log-probability from one step of 1/2048 nat to the next."""

    class Trembling(TransformersEngine):
        def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
            scores = super().score(examples)
            sign = 1 if len(examples) == 1 else -1
            half_steps = [np.floor(one.topk_logprobs * 2048) / 2048 + 0.5 / 2048 + sign * 1e-6 for one in scores]
            return [replace(one, topk_logprobs=logprobs) for one, logprobs in zip(scores, half_steps, strict=True)]

    found = measured(world, tmp_path, Trembling)
    assert found.batch_error < 1e-5


def test_the_rows_that_are_tried_are_of_every_length(tmp_path: Path) -> None:
    rows = random_examples(40, seed=0)
    write_examples(tmp_path / "rows.arrow", rows)
    lengths = [len(row.token_ids) for row in spread_over_lengths(ExampleFile(tmp_path / "rows.arrow"), 4)]
    whole = [len(row.token_ids) for row in rows]
    assert len(lengths) == 4 and lengths == sorted(lengths)
    assert lengths[0] == min(whole) < lengths[1] < lengths[2] < lengths[3] == max(whole)
    assert ExampleFile(tmp_path / "rows.arrow").largest_id == max(int(row.token_ids.max()) for row in rows)
    write_examples(tmp_path / "few.arrow", rows[:2])
    assert len(spread_over_lengths(ExampleFile(tmp_path / "few.arrow"), 4)) == 2


# ---- the command, on a pretrained pair


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A configuration file and overrides for a teacher that needs no training, and rows that it wrote."""
    folder = tmp_path_factory.mktemp("pair")
    tiny_llama(folder / "teacher", seed=1, hidden_size=64, layers=2, tied=False)
    tiny_llama(folder / "student", seed=2)
    for name, words in (("teacher", VOCAB), ("student", VOCAB), ("stranger", VOCAB - 1)):
        tokenizer = word_tokenizer(words)
        tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save_pretrained(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    rows = []
    for row in random_examples(20, seed=4, longest=12):
        ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        prompt, response = (" ".join(f"w{token}" for token in part.tolist()) for part in (ids[0], answer))
        rows.append(json.dumps({"instruction": prompt, "response": response}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))
    config = {
        "name": "seen", "output": str(folder / "runs"),
        "data": {
            "source": {"kind": "files", "path": str(folder / "rows.jsonl")}, "heldout_rows": 6, "special_tokens": "keep",
            "format": {"kind": "instruction", "prompt": "{{ instruction }} "},
        },
        "teacher": {
            "model": {"kind": "pretrained", "name": str(folder / "teacher")},
            "engine": {"kind": "transformers", "dtype": "float32"},
        },
        "student": {"model": {"kind": "pretrained", "name": str(folder / "student")}}, "scores": {"top_k": TOP_K},
        "evaluate": {"max_new_tokens": 8},
    }  # fmt: skip
    (folder / "pair.yaml").write_text(json.dumps(config))  # JSON is YAML
    return [str(folder / "pair.yaml")]


def config_of(arguments: list[str], *overrides: str) -> RunConfig:
    return load_config(arguments[0], overrides)


def test_what_is_said_of_attention_goes_where_the_model_goes(arguments: list[str]) -> None:
    config = config_of(arguments, "teacher.model.attention=eager", "student.model.attention=sdpa")
    models = Models(config, config.run_dir)
    assert [models.begun(role).attention for role in ROLES] == ["eager", "sdpa"]
    assert models.ready("teacher").attention == "eager" and models.distilled().attention == "sdpa"


@pytest.mark.ray
@pytest.mark.slow
def test_the_doctor_passes_a_sound_pair_and_leaves_no_scores(
    local_ray: None, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 0, capsys.readouterr()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-13:]] == [f"ok {check}" for check in OF_THE_RUN + CHECKS]
    run = config_of(arguments).run_dir
    assert [path.name for path in (run / "stages").iterdir()] == ["prepare.json"]
    assert [path.name for path in run.parent.iterdir()] == ["seen"] and not list(run.glob("doctor-*"))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [finding["state"] for finding in events[-1]["findings"]] == ["ok"] * 13


@pytest.mark.ray
@pytest.mark.parametrize(
    ("returns", "said"),
    [
        ("nan", "target_logprob holds nan; the teacher's scores must be finite"),
        ("uniform", "distributions are uniform"),
        ("constant", "the teacher does not read its input"),
    ],
)
def test_scores_that_no_store_takes_are_a_finding(local_ray: None, arguments: list[str], returns: str, said: str) -> None:
    findings = diagnose(config_of(arguments), FakeTeacher(vocab_size=VOCAB, returns=returns))
    assert [finding.check for finding in findings] == ["devices", "tokens", "rows", "ends", "scores"]
    failed = the_failed(findings)
    assert said in failed.line() and "try teacher.engine.dtype=float32" in failed.line()


@pytest.mark.ray
def test_a_teacher_that_cannot_serve_is_no_finding(local_ray: None, world: World, tmp_path: Path) -> None:
    with pytest.raises(TeacherFailed, match="RuntimeError: call 1 of the fake teacher fails"):
        folder = PassingFolder(tmp_path, str(tmp_path))
        measure_served(world.spec(), world.rows, folder, VOCAB, FakeTeacher(vocab_size=VOCAB, fails_on_call=1))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_the_doctor_passes_what_vllm_serves(local_ray: None, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments, "name=vllm", "teacher.engine.kind=vllm"]) == 0, capsys.readouterr()
    assert [line[:3] for line in capsys.readouterr().out.splitlines()[-9:]] == ["ok "] * 9


def test_a_pair_of_other_tokens_is_a_failed_check_before_anything_is_begun(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = str(Path(arguments[0]).parent / "stranger")
    assert main(["doctor", *arguments, "name=strangers", f"student.model.name={stranger}"]) == 1
    assert "FAILED tokens: teacher and student do not speak the same tokens" in capsys.readouterr().out
    assert not config_of(arguments, "name=strangers").run_dir.exists()


def test_what_cannot_be_prepared_is_an_error_as_in_a_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments, "name=nowhere", "data.source.path=nowhere.jsonl"]) == 2
    assert "error: there is no file" in capsys.readouterr().err
    assert "Traceback" in (config_of(arguments, "name=nowhere").run_dir / "error.log").read_text()
