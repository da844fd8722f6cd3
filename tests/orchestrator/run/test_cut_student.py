"""The student that a run cuts from its teacher: its folder, its record, and what is refused before rows are read."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

from actors.config.model_kinds import CutModel
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from orchestrator.config.load import validate
from orchestrator.models.block_influence import block_influences
from orchestrator.models.model_checks import RowLimits, require_models_fit
from orchestrator.models.models import Models, attention_heads, ids_below
from orchestrator.planning.meta_models import meta_model
from orchestrator.planning.shapes import shape_of, workload_of
from orchestrator.run.cut_student import cut_student, read_record, require_can_be_cut, write_cut
from orchestrator.run.run_dir import RunDir, RunDirError
from tests.worlds import VOCAB, random_examples, tiny_llama, word_tokenizer

LAYERS = 5


def run_of(folder: Path, layers: Any, **teacher: Any) -> Models:
    """The models of a run whose teacher is a folder of ``LAYERS`` layers and whose rows and tokenizer are there."""
    model = {"kind": "pretrained", "name": str(folder / "teacher")}
    sections = {"teacher": {"model": model, **teacher}, "student": {"model": {"kind": "cut", "layers": layers}}}
    return Models(validate({"name": "cut", "output": str(folder), **sections}), folder / "cut")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "teacher", seed=0, layers=LAYERS)
    (tmp_path / "cut" / "data").mkdir(parents=True)
    write_examples(tmp_path / "cut" / "data" / "train.arrow", random_examples(6, seed=0))
    word_tokenizer().save_pretrained(tmp_path / "cut" / "tokenizer")
    return tmp_path


def test_the_student_has_the_teachers_weights_under_new_numbers(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = run_of(world, [0, 2, 4])
    with caplog.at_level(logging.INFO, "atkd"):
        facts = cut_student(RunDir(world / "cut"), models)
    assert facts["layers"] == (0, 2, 4) and facts["of"] == LAYERS and facts["influences"] is None
    assert f"student: layers 0, 2, 4 of the 5 of {world / 'teacher'} (named)" in caplog.text

    folders = world / "teacher", Path(models.begun("student").name)
    teacher, student = (load_file(folder / "model.safetensors") for folder in folders)
    for name, weight in student.items():
        _, found, rest = name.partition("layers.")
        place, _, inner = rest.partition(".")
        theirs = f"model.layers.{(0, 2, 4)[int(place)]}.{inner}" if found else name
        assert torch.equal(weight, teacher[theirs])
    assert models.tokenizer().get_vocab() == word_tokenizer().get_vocab()
    assert models.export_dtype() == "float32" and ids_below(models) == VOCAB


def test_what_was_cut_is_not_cut_again(world: Path) -> None:
    models = run_of(world, 2)
    first = cut_student(RunDir(world / "cut"), models)
    written = Path(models.begun("student").name) / "model.safetensors"
    at = written.stat().st_mtime_ns
    (world / "teacher" / "model.safetensors").unlink()
    assert cut_student(RunDir(world / "cut"), models) == first
    assert written.stat().st_mtime_ns == at and first["layers"] == (0, 4)


def test_a_finetuned_teacher_is_cut_as_it_is_when_it_is_ready(world: Path) -> None:
    models = run_of(world, 2, finetune={"train": {}})
    tiny_llama(models.finetuned_folder("teacher"), seed=7, layers=LAYERS)
    cut_student(RunDir(world / "cut"), models)
    record = read_record(Path(models.begun("student").name))
    assert record.teacher == str(models.finetuned_folder("teacher")) and record.commit is None


def test_the_stored_type_is_the_teachers(world: Path) -> None:
    AutoModelForCausalLM.from_pretrained(world / "teacher").to(torch.bfloat16).save_pretrained(world / "teacher")
    models = run_of(world, 3)
    cut_student(RunDir(world / "cut"), models)
    assert models.export_dtype() == "bfloat16"


@torch.no_grad()
def test_influence_is_one_minus_the_mean_cosine_of_a_blocks_input_and_output(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float64)
    rows = [torch.from_numpy(example.token_ids).long() for example in random_examples(3, seed=4)]
    cosines: list[list[float]] = [[] for _ in range(LAYERS - 1)]  # the last state is behind the final norm
    for row in rows:
        states = model(row[None], output_hidden_states=True, use_cache=False).hidden_states
        for layer, measured in enumerate(cosines):
            for before, after in zip(states[layer][0], states[layer + 1][0], strict=True):
                measured.append(float(before @ after / (before.norm() * after.norm())))
    expected = [1 - sum(measured) / len(measured) for measured in cosines]
    assert block_influences(model, rows)[:-1] == pytest.approx(expected)


def test_a_block_that_changes_nothing_is_the_first_to_go(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "teacher")
    for name, weight in model.model.layers[1].named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
    model.save_pretrained(world / "teacher")
    cut = CutModel(kind="cut", layers=4, choose="least_influence", influence_rows=3)
    examples = ExampleFile(world / "cut" / "data" / "train.arrow")
    write_cut(cut, ModelSource(str(world / "teacher")), world / "cut" / "tokenizer", examples, world / "student")
    record = read_record(world / "student")
    assert record.layers == (0, 2, 3, 4) and record.influences is not None
    assert record.influences[1] == pytest.approx(0, abs=1e-6)
    assert min(record.influences[:1] + record.influences[2:]) > 0.01
    assert "influence of each layer: " in record.line()
    assert json.loads((world / "student" / "cut.json").read_text())["choose"] == "least_influence"


def test_nothing_is_left_of_a_cut_that_fails(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = run_of(world, [1, 2])
    monkeypatch.setattr("orchestrator.run.cut_student.mean_kl", lambda *_: 0.5)
    with pytest.raises(ValueError, match=r"read again, the student is 5\.00e-01 nats from the layers that were kept"):
        cut_student(RunDir(world / "cut"), models)
    assert list((world / "cut" / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (LAYERS, r"student\.model\.layers keeps 5, and the teacher has 5 layers: nothing would be cut; 2 would do"),
        ([1, 5], r"student\.model\.layers names 5, and the teacher's 5 layers are 0 to 4; \[1, 4\] would do"),
    ],
)
def test_layers_beyond_the_teachers_are_refused_without_its_weights(world: Path, layers: Any, message: str) -> None:
    (world / "teacher" / "model.safetensors").unlink()
    models = run_of(world, layers)
    with pytest.raises(ValueError, match=message):
        require_can_be_cut(models)


def test_a_teacher_whose_layers_depend_on_their_place_is_refused_without_its_weights(world: Path) -> None:
    GPT2Config(n_embd=8, n_layer=LAYERS, n_head=2, scale_attn_by_inverse_layer_idx=True).save_pretrained(world / "teacher")
    with pytest.raises(ValueError, match=r"student\.model\.kind is cut, and the teacher, a GPT2\w+, cannot be: its layer 2"):
        require_can_be_cut(run_of(world, [0, 2]))


@pytest.mark.parametrize("choose", ["evenly", "least_influence"])
def test_the_shape_of_a_student_is_known_before_it_is_cut(world: Path, choose: str) -> None:
    models = run_of(world, 2)
    config = models.config.model_copy(
        update={"student": models.config.student.model_copy(update={"model": CutModel(kind="cut", layers=2, choose=choose)})}
    )
    models = Models(config, world / "cut")
    (world / "teacher" / "model.safetensors").unlink()
    work = workload_of(config, rows=20, row_tokens=20, row_targets=8)
    teacher, student = (shape_of(meta_model(config, role, work)) for role in ("teacher", "student"))
    assert (student.layers, student.vocab_size) == (2, VOCAB)
    assert teacher.weights - student.weights == (LAYERS - 2) * teacher.layer_weights
    assert models.settings("student").num_hidden_layers == 2 and attention_heads(models, "student") == (2, 2)
    with pytest.raises(ValueError, match=r"the student cut from .*/teacher knows 64 positions"):
        require_models_fit(config, models, RowLimits(longest=80, longest_prompt=0, largest_id=-1))


def test_other_layers_do_not_resume_a_run(world: Path) -> None:
    (world / "cut").rename(world / "moved")
    RunDir.open(run_of(world, 2).config).close()
    with pytest.raises(RunDirError, match=r"student\.model\.layers: 3 here, 2 there"):
        RunDir.open(run_of(world, 3).config)
