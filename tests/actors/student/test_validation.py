"""A student that is examined while it learns: when, what is measured, who is told to stop, and that nothing else changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed
import torch.multiprocessing
from transformers import AutoModelForCausalLM

from actors.config.models import EvaluateConfig, LoraAdapter, OptimizerConfig, TrainConfig
from actors.evaluation.answers import means_by_task
from actors.evaluation.evaluator import evaluate_model, predict_rows
from actors.evaluation.metrics import HeldoutMetrics, HeldoutRows
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.monitors.metrics_log import read_metrics
from actors.score_store.store import ScoreStore
from actors.student.loop import distil
from actors.student.task import AnswerSchedule, TrainingTask, ValidationSchedule
from actors.student.train_checkpoints import NoCheckpoints
from losses.config import AtkdLoss
from tests.actors.witness import Witness
from tests.worlds import VOCAB, heldout_texts, scored_world, tiny_llama

TRAIN = TrainConfig(
    epochs=2, batch_rows=8, micro_batch_rows=3, optimizer=OptimizerConfig(learning_rate=3e-3), checkpoint_every_steps=1
)
STEPS = (2, 5, 6)  # of six
ADAPTERS = LoraAdapter(rank=2, dropout=0.3)
CUTS: tuple[Any, ...] = ("replicate", "fsdp")
TASKS = ("long", None, "short", "long")
ANSWERED = EvaluateConfig(batch_rows=2, generate_rows=5, max_new_tokens=4, by_task="rouge_l")  # odd: ranks have unequal shares


def exams_of(world: Path, controller: Any) -> ValidationSchedule:
    """Seven rows, three at a time: a second rank has none in the last turn."""
    return ValidationSchedule(
        7,
        STEPS,
        str(world / "heldout" / "train.arrow"),
        str(world / "heldout" / "store"),
        top_k=8,
        batch_rows=3,
        controller=controller,
    )


def with_answers(validation: ValidationSchedule, world: Path) -> ValidationSchedule:
    """The same, with answers at the end."""
    answers = AnswerSchedule(str(world / "texts.jsonl"), ModelSource(str(world / "model")), ANSWERED)
    return replace(validation, answers=answers)


def task_in(folder: Path, world: Path, **changes: Any) -> TrainingTask:
    task = TrainingTask(
        name="train", model=ModelSource(str(world / "model")), tokenizer=str(world / "model"), lora=None,
        loss=AtkdLoss(kind="atkd"), train=TRAIN, examples=str(world / "train.arrow"), store=str(world / "store"), top_k=8,
        wait_seconds=5.0, seed=5, threads=1, gpu=False, metrics=str(folder / "metrics"), output=str(folder / "student"),
    )  # fmt: skip
    return replace(task, **changes)


@pytest.fixture(scope="module")
def witness(local_ray: None) -> Any:
    """One controller for all tests: the start of a process takes longer than any of them."""
    return ray.remote(Witness).options(num_cpus=0, name="witness", namespace="validation").remote()


def heard_of(witness: Any, task: TrainingTask, checkpoints: Any = None, last_rung: int | None = None) -> list[Any]:
    """Train a student, and return what its controller hears, who says stop at a rung."""
    ray.get(witness.begin.remote(last_rung))
    distil(task, checkpoints or NoCheckpoints())
    heard: list[Any] = ray.get(witness.heard.remote())
    return heard


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    return weights


def steps_of(folder: Path) -> list[float]:
    return [line["step"] for line in read_metrics(folder / "metrics" / "train.jsonl")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, held-out rows, what a random teacher says of them, and a model with dropout in its attention."""
    folder = tmp_path_factory.mktemp("validation")
    scored_world(folder, rows=24)
    scored_world(folder / "heldout", rows=7, seed=9)
    word_list = " ".join(f"w{word}" for word in range(VOCAB))  # Rouge-L is then above 0, whatever the answer
    (folder / "texts.jsonl").write_text(heldout_texts([word_list] * 7, TASKS))
    config = tiny_llama(folder / "model", seed=1) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.3}))
    return folder


@pytest.fixture(scope="module")
def examined(witness: Any, world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """One worker that goes on to the end; what its controller heard."""
    folder = tmp_path_factory.mktemp("examined")
    return folder, heard_of(witness, task_in(folder, world, validation=exams_of(world, witness)))


@pytest.mark.ray
def test_a_student_is_examined_after_the_steps_that_were_named(examined: tuple[Path, list[Any]]) -> None:
    folder, heard = examined
    assert [(rung, step) for rung, step, _ in heard] == [(0, 2), (1, 5), (2, 6)]
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6]


@pytest.mark.ray
def test_it_is_measured_as_the_evaluator_measures_the_finished_model(world: Path, examined: tuple[Path, list[Any]]) -> None:
    folder, heard = examined
    model = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    validation = exams_of(world, None)
    tally = predict_rows(model, ExampleFile(Path(validation.examples)), ScoreStore(validation.store), 8, 7, "student")
    assert heard[-1][2] == pytest.approx(tally.measures(), abs=1e-6)
    assert set(heard[-1][2]) == {"heldout_loss", "kl_to_teacher", "top1_agreement", "calibration_error"}


@pytest.mark.ray
def test_its_answers_are_measured_at_the_end_as_the_evaluator_measures_them(
    world: Path, examined: tuple[Path, list[Any]], witness: Any, tmp_path: Path
) -> None:
    heldout, student = exams_of(world, None), ModelSource(str(examined[0] / "student"))

    def evaluated(texts: Path) -> Any:
        tokenizer = ModelSource(str(world / "model"))
        return evaluate_model(student, tokenizer, heldout.examples, heldout.store, str(texts), ANSWERED, 8)

    first = [answer.generated for answer in evaluated(world / "texts.jsonl").answers]
    assert any(first), "it answers something"
    references = [first[0], f"{first[1]} w5", "w1", "w1 w2", first[4], "w1", "w1"]  # right, half right and wrong ones
    texts = tmp_path / "texts.jsonl"
    texts.write_text(heldout_texts(references, TASKS))
    answers, expected = evaluated(texts).answers, evaluated(texts).metrics
    assert 0 < expected.exact_match < 1 and 0 < expected.rouge_l < 1
    validation = with_answers(exams_of(world, witness), tmp_path)
    validation = replace(validation, answers=replace(validation.answers, tokenizer=ModelSource(str(world / "model"))))
    heard = heard_of(witness, task_in(tmp_path, world, output=None, validation=validation))
    assert [("exact_match" in measures) for _, _, measures in heard] == [False, False, True]
    assert heard[-1][2]["exact_match"] == expected.exact_match
    assert heard[-1][2]["rouge_l"] == pytest.approx(expected.rouge_l)
    by_task = means_by_task(answers, "rouge_l")
    assert len(set(by_task.values())) == 2 and by_task.keys() == {"long", "short"}
    for task, value in by_task.items():
        assert heard[-1][2][f"rouge_l.{task}"] == pytest.approx(value)


@pytest.mark.ray
@pytest.mark.parametrize("lora", [None, ADAPTERS], ids=["all weights", "adapters"])
def test_exams_change_nothing(witness: Any, world: Path, tmp_path: Path, lora: LoraAdapter | None) -> None:
    """Bit for bit, with dropout; the second runs in a process in which a student was trained before, as a trial does."""
    for name, validation in (("plain", None), ("examined", with_answers(exams_of(world, witness), world))):
        assert bool(heard_of(witness, task_in(tmp_path / name, world, lora=lora, validation=validation))) == (name == "examined")
        torch.rand(11)  # another trial of the process draws, too
    plain, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "examined")
    assert all(torch.equal(plain[name], other[name]) for name in plain) and plain.keys() == other.keys()
    begun = AutoModelForCausalLM.from_pretrained(world / "model").state_dict()
    assert any(not torch.equal(plain[name], begun[name]) for name in plain)


@pytest.mark.ray
def test_a_student_that_is_told_to_stop_stops(witness: Any, world: Path, tmp_path: Path) -> None:
    kept = Kept()
    heard = heard_of(witness, task_in(tmp_path, world, output=None, validation=exams_of(world, witness)), kept, last_rung=0)
    assert steps_of(tmp_path) == [1, 2] and len(heard) == 1
    assert kept.steps == [1], "none after the step that was its last"
    assert not (tmp_path / "student").exists()


@pytest.mark.ray
def test_an_exam_comes_before_the_checkpoint_of_its_step(witness: Any, world: Path, tmp_path: Path) -> None:
    """Workers that take up the checkpoint of a step never come by its exam again."""
    kept = Kept(lambda: len(ray.get(witness.heard.remote())))
    heard_of(witness, task_in(tmp_path, world, output=None, validation=exams_of(world, witness)), kept)
    assert kept.steps == [1, 2, 3, 4, 5] and kept.told == [0, 1, 1, 1, 2]


@pytest.mark.ray
def test_a_student_whose_logits_are_not_finite_is_refused_by_name(witness: Any, world: Path, tmp_path: Path) -> None:
    hot = TRAIN.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e12, clip_norm=None, warmup_ratio=0.0)})
    validation = replace(exams_of(world, witness), steps=(1, 6))
    with pytest.raises(ValueError, match="the logits of train are not finite on the held-out rows; its training diverged"):
        heard_of(witness, task_in(tmp_path, world, output=None, train=hot, validation=validation))
    assert ray.get(witness.heard.remote()) == []


class Kept(NoCheckpoints):
    """Notes after which steps a checkpoint would have been kept, and what ``tell`` says at that time."""

    def __init__(self, tell: Callable[[], int] = lambda: 0) -> None:
        self.steps: list[int] = []
        self.told: list[int] = []
        self._tell = tell

    def save(self, student: Any, optimizer: Any, schedule: Any, progress: Any, worker: Any) -> None:
        self.steps.append(progress.step)
        self.told.append(self._tell())


# ---- two ranks


def of_cut(cut: str, world: Path, controller: Any) -> ValidationSchedule:
    """Replicas answer too, at their last exam, which is their second."""
    validation = replace(exams_of(world, controller), steps=STEPS[:2])
    return with_answers(validation, world) if cut == "replicate" else validation


def rank_main(rank: int, world: Path, address: str) -> None:
    """What each of two processes does: a student a cut, stopped at its second exam; and logits that the second finds spoiled."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(world / "rendezvous"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    controller = None
    if rank == 0:  # who alone speaks to the controller
        ray.init(address=address, namespace="validation", log_to_driver=False, logging_level="ERROR")
        controller = ray.get_actor("witness")
    for cut in CUTS:
        train = TRAIN.model_copy(update={"sharding": cut})
        task = task_in(
            world / cut, world, model=ModelSource(str(world / "plain")), train=train, validation=of_cut(cut, world, controller)
        )
        distil(task, NoCheckpoints())
        (world / f"{cut} {rank}").touch()
    validation = exams_of(world, controller)
    rows = HeldoutRows(ExampleFile(Path(validation.examples)), ScoreStore(validation.store), 8, VOCAB)
    batch, tally = rows.batch(np.arange(7)), HeldoutMetrics()
    tally.add_logits(torch.full((len(batch.targets), VOCAB), 0.0 if rank == 0 else torch.nan), batch)
    tally.sum_over_workers(torch.device("cpu"))
    try:
        tally.require_finite("student")
    except ValueError as error:
        (world / f"error {rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(witness: Any, world: Path) -> tuple[Path, list[Any]]:
    """What two ranks left behind, and what their controller heard."""
    tiny_llama(world / "plain", seed=1)  # without dropout, which two ranks draw otherwise than one
    address = ray.get_runtime_context().gcs_address
    ray.get(witness.begin.remote(1))
    torch.multiprocessing.spawn(rank_main, (world, address), nprocs=2)
    return world, ray.get(witness.heard.remote())


@pytest.mark.ray
@pytest.mark.parametrize("cut", CUTS)
def test_two_ranks_measure_what_one_does_and_stop_together(
    two_ranks: tuple[Path, list[Any]], witness: Any, cut: str, tmp_path: Path
) -> None:
    world, heard = two_ranks
    task = task_in(tmp_path, world, model=ModelSource(str(world / "plain")), validation=of_cut(cut, world, witness))
    alone = heard_of(witness, task, last_rung=1)
    mine = heard[2 * CUTS.index(cut) :][:2]
    for (rung, step, measures), (expected_rung, expected_step, expected) in zip(mine, alone, strict=True):
        assert (rung, step) == (expected_rung, expected_step)
        assert measures == pytest.approx(expected, abs=1e-6)
    assert steps_of(world / cut) == steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert all((world / f"{cut} {rank}").exists() for rank in (0, 1))
    assert cut == "fsdp" or (0 < mine[-1][2]["rouge_l"] < 1 and "rouge_l.short" in mine[-1][2])
    torch.testing.assert_close(weights_of(world / cut), weights_of(tmp_path), atol=1e-5, rtol=0)


@pytest.mark.ray
def test_logits_that_one_rank_finds_spoiled_are_refused_by_both(two_ranks: tuple[Path, list[Any]]) -> None:
    """A rank that left alone would leave the other waiting for its sums."""
    messages = {(two_ranks[0] / f"error {rank}").read_text() for rank in (0, 1)}
    assert messages == {"the logits of student are not finite on the held-out rows; its training diverged"}
