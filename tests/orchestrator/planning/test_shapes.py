"""What a plan reads off configuration and data, held against models and rows that are really there."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from actors.config.models import LoraAdapter, TrainConfig
from actors.examples import ExampleFile, write_examples
from actors.lora import add_adapters
from actors.model_source import ModelSource
from actors.models import load_model
from orchestrator.models.models import Models
from orchestrator.planning.jobs import Estimator, trainings
from orchestrator.planning.meta_models import adapted, meta_model
from orchestrator.planning.shapes import Passes, Workload, passes_of, read_workload, shape_of, workload_of
from orchestrator.run.run_dir import RunDir
from orchestrator.run.stages import prepare
from tests.orchestrator.config.test_run import changed

SMALL = ("data.source={kind: builtin, rows: 300}", "data.heldout_rows=40", "tokenizer.vocab_size=400", "data.max_tokens=80")


def rows(*lengths: int) -> Workload:
    sizes = np.array(lengths)
    return Workload(sizes, sizes // 2, 0, 0, int(sizes.max()), 96, "made up")


def test_rows_are_those_a_run_prepares_and_are_read_from_its_folder_once_it_did(tmp_path: Path) -> None:
    config = changed(*SMALL, f"output={tmp_path}", "name=planned")
    before = read_workload(config)
    assert not config.run_dir.exists(), "a plan leaves nothing behind"
    with RunDir.open(config) as run_dir:
        facts = run_dir.stage("prepare", lambda: prepare(config, run_dir, Models(config, run_dir.path)))
    counts = facts["counts"]
    after = read_workload(config)
    for work in (before, after):
        assert (work.rows, work.train_tokens, work.train_targets) == (
            counts["train_rows"], counts["train_tokens"], counts["train_targets"],
        )  # fmt: skip
        assert (work.heldout_targets, work.longest, work.vocab_size) == (counts["heldout_targets"], counts["longest"], 400)
    assert (before.source, after.source) == ("the data, read for this plan", "the rows that this run has prepared")
    other = read_workload(changed(*SMALL, f"output={tmp_path}", "name=planned", "data.max_rows=200"))
    assert other.source == "the data, read for this plan" and other.rows == 160
    models = Models(config, config.run_dir)
    for role in ("teacher", "student"):
        real = load_model(ModelSource(models.begun(role).name))
        found = shape_of(meta_model(config, role, after))
        assert found.weights == sum(weight.numel() for weight in real.parameters())
        assert found == shape_of(real)
    assert len(ExampleFile(config.run_dir / "data" / "train.arrow")) == after.rows


def test_responses_are_planned_as_long_as_they_may_be_and_counted_once_they_are_there(tmp_path: Path) -> None:
    config = changed(*SMALL, f"output={tmp_path}", "responses={writer: teacher, samples_per_prompt: 2, max_new_tokens: 70}")
    with RunDir.open(config) as run_dir:
        run_dir.stage("prepare", lambda: prepare(config, run_dir, Models(config, run_dir.path)))
        before = read_workload(config)
        own = ExampleFile(run_dir.path / "data" / "train.arrow")
        prompts = [len(own[row].last_prompt) for row in range(len(own))]
        assert before.lengths.tolist() == [prompt + 70 for prompt in prompts] * 2
        assert before.targets.tolist() == [70] * 2 * len(own)
        assert before.longest == max(prompts) + 70
        assert before.source == "the rows that this run has prepared; responses as long as responses.max_new_tokens 70 allows"
        assert before.own is not None and before.own.lengths.tolist() == own.lengths.tolist()
        written = [own[row] for row in range(10)]
        write_examples(run_dir.path / "data" / "written.arrow", written)
        run_dir.stage("respond", lambda: {})
    after = read_workload(config)
    assert after.lengths.tolist() == own.lengths.tolist()[:10] and after.own is not None and after.own.rows == len(own)
    assert after.train_targets == sum(int(row.loss_mask.sum()) for row in written)
    assert after.source == "the rows that this run has prepared"
    said = workload_of(config, rows=100, row_tokens=30, row_targets=10)
    assert (said.rows, said.train_tokens, said.train_targets) == (200, 200 * (20 + 70), 200 * 70)
    assert said.longest == 80 + 70 and said.own is not None and said.own.train_tokens == 3000


def test_fine_tuning_is_planned_on_the_datas_own_rows() -> None:
    config = changed(*SMALL, "responses={writer: teacher, samples_per_prompt: 3, max_new_tokens: 100}")
    work = workload_of(config, rows=64, row_tokens=30, row_targets=10)
    estimator = Estimator(config, work)
    fitting, distilling = trainings(config)
    assert (fitting.name, distilling.name) == ("finetune_teacher", "train")
    assert estimator.rows(fitting) is work.own and estimator.rows(distilling) is work
    assert estimator.passes(fitting).tokens < estimator.passes(distilling).tokens


def test_adapters_are_counted_as_they_are_made() -> None:
    config = changed(*SMALL)
    lora = LoraAdapter(rank=3)
    found = shape_of(adapted(meta_model(config, "student", rows(20)), lora))
    plain = shape_of(meta_model(config, "student", rows(20)))
    shape = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    real = add_adapters(LlamaForCausalLM(shape), lora)
    learning = sum(weight.numel() for weight in real.parameters() if weight.requires_grad)
    assert (found.trained, found.weights, found.trains_head) == (learning, plain.weights + learning, False)


def test_passes_are_those_of_the_loop() -> None:
    work = rows(10, 4, 30, 7, 22, 9)
    train = TrainConfig(epochs=1, batch_rows=4, micro_batch_rows=2)
    # steps of rows (10, 4, 30, 7) and (22, 9), longest first, two rows a pass: 30 10 | 7 4 and 22 9
    context = (100 + 16 + 900 + 49 + 484 + 81) / 82
    assert passes_of(work, train, 1, seed=0) == Passes(2, 30, 20, True, (60 + 14 + 44) / 82, context)
    # of two workers the first takes 30 7 and 22
    assert passes_of(work, train, 2, seed=0) == Passes(2, 30, 18, False, (60 + 22) / 59, context)


def test_packed_passes_have_no_padding_and_attend_over_all_that_is_in_them() -> None:
    work = rows(10, 4, 30, 7, 22, 9)
    train = TrainConfig(epochs=1, batch_rows=4, micro_batch_tokens=20, packing=True)
    # steps of rows (10, 4, 30, 7) and (22, 9): 30 | 10 7 | 4 and 22 | 9
    assert passes_of(work, train, 1, seed=0) == Passes(1, 30, 15, True, 1.0, (30**2 + 17**2 + 4**2 + 22**2 + 9**2) / 82)
    larger = train.model_copy(update={"micro_batch_tokens": 100})
    assert passes_of(work, larger, 1, seed=0) == Passes(1, 51, 25, False, 1.0, (51**2 + 31**2) / 82)
    longest_named = replace(work, longest=90)
    assert passes_of(longest_named, train, 1, seed=0).tokens == 90
    assert passes_of(longest_named, larger, 1, seed=0).tokens == 100


def test_what_the_user_says_of_rows_comes_to_that_in_all() -> None:
    work = workload_of(changed(*SMALL), rows=1000, row_tokens=31.4, row_targets=12.7)
    assert (work.rows, work.train_tokens, work.train_targets) == (1000, 31_400, 12_700)
    assert (work.longest, work.heldout_tokens) == (80, 1256)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((0, 30, 10), "--rows 0 is no number of training rows; 1 is the least"),
        ((5, 90, 10), r"--row-tokens 90 must lie between 2 and data.max_tokens 80.*; data.max_tokens=90 would keep them"),
        ((5, 30, 30), r"--row-targets 30 must be at least 1 and below --row-tokens 30.*; 15 would do"),
    ],
)
def test_rows_that_cannot_be_are_refused(said: tuple[int, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload_of(changed(*SMALL), *said)


def test_what_is_on_the_hub_is_not_fetched_for_a_plan(tmp_path: Path) -> None:
    config = changed("data.source={kind: hub, name: someone/data}", f"output={tmp_path}")
    with pytest.raises(ValueError, match=r"someone/data' is on the hub .*; say --rows, --row-tokens and --row-targets"):
        read_workload(config)
    teacher = changed("tokenizer=null", "teacher.model={kind: pretrained, name: someone/model}", "teacher.finetune=null")
    with pytest.raises(ValueError, match=r"teacher.model.name 'someone/model': its config.json.*teacher.model.name=/a/folder"):
        meta_model(teacher, "teacher", rows(20))


def test_a_pretrained_model_needs_its_config_alone(tmp_path: Path) -> None:
    settings = LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    (tmp_path / "config.json").write_text(json.dumps(settings.to_dict()))
    config = changed("tokenizer=null", f"teacher.model={{kind: pretrained, name: {tmp_path}}}", "teacher.finetune=null")
    teacher, student = (shape_of(meta_model(config, role, rows(20))) for role in ("teacher", "student"))
    assert (teacher.vocab_size, teacher.layers, teacher.kv_size, teacher.tied) == (500, 2, 32, False)
    assert student.vocab_size == 500, "a student from scratch has the teacher's vocabulary"
