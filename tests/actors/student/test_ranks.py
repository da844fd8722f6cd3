"""One step on one worker and on two gloo ranks: the same loss and gradients, replicated or sharded, however it is cut."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from pydantic import TypeAdapter
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from actors.config.models import LoraAdapter, TrainConfig
from actors.dataloader.collator import collate
from actors.dataloader.rollout_rows import RolloutRows
from actors.dataloader.row_sources import RowPolicy, RowSources, written_by_student
from actors.dataloader.sampler import StepSampler
from actors.dataloader.scored_rows import FileRows, StoredRows
from actors.dataloader.step_loader import StepLoader
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores
from actors.rollouts.weights import Proof
from actors.score_store.rollout_log import RolloutLog, Sampled
from actors.score_store.store import ScoreStore
from actors.student.causal_lm import CausalStudent, make_student, prepare_model
from actors.student.hand_over import WeightPublisher
from actors.student.loop import accumulate_gradients, forward
from actors.student.model import distribute, set_gradient_sync
from actors.student.ranks import Worker
from actors.student.task import RolloutTask, TrainingTask
from losses.config import LossConfig
from losses.loss_state import LossState
from tests.worlds import VOCAB, random_examples, scored_world, scores_from_logits, tiny_llama

LOSS: TypeAdapter[LossConfig] = TypeAdapter(LossConfig)
CASES: dict[str, dict[str, Any]] = {
    "atkd": {"kind": "atkd"},
    "atkd over the dataset, reversed": {"kind": "atkd", "scope": "dataset", "divergence": "reverse_kl"},
    "a selection by the student": {
        "kind": "coupled", "divergence": "jensen_shannon", "tokens": "student_entropy",
        "samples": {"kind": "teacher_loss", "threshold_start": 3.0, "threshold_end": 4.0},
    },
    "a policy gradient beside the data's rows": {"kind": "policy_gradient", "corpus_weight": 0.5},
    "cross entropy beside it": {"kind": "decoupled", "tokens": "hellinger", "cross_entropy_weight": 0.5},
}  # fmt: skip
SHARE = 0.6
"""Of the first step's rows, those of the log, where the loss learns from what was drawn."""
HEAD_ADAPTER = LoraAdapter(rank=2, modules=("q_proj", "lm_head"))
CUTS = [("replicate", 1, None), ("replicate", 2, HEAD_ADAPTER), ("fsdp", 2, None), ("fsdp", 1, HEAD_ADAPTER)]
"""Sharding, rows of a forward pass, adapters. Seven rows do not go round: one rank takes part with a weightless pass."""

PACKED = ("atkd", "a selection by the student", "a policy gradient beside the data's rows")
"""Losses whose steps are packed too."""

Gradients = dict[str, torch.Tensor]


def step_gradients(
    folder: Path, worker: Worker, settings: dict[str, Any], sharding: Any, rows: int, lora: LoraAdapter | None,
    precision: Any = "float32", tokens: int | None = None, packing: bool = False,
) -> tuple[float, Gradients]:  # fmt: skip
    """The loss of one step and its gradients, summed over workers."""
    loss = LOSS.validate_python(settings)
    train = TrainConfig(
        batch_rows=7, micro_batch_rows=rows, sharding=sharding, precision=precision, micro_batch_tokens=tokens, packing=packing
    )
    torch.manual_seed(0)
    model = prepare_model(ModelSource(str(folder / "model")), lora, train)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # they begin at zero, where half of the gradients vanish
            torch.nn.init.normal_(weight, std=0.1)
    student = distribute(CausalStudent(model, loss), train, worker)
    examples, store = ExampleFile(folder / "train.arrow"), ScoreStore(folder / "store")
    rows = StoredRows(examples, store, 8, StepSampler(len(examples), 7, seed=0, store_order_first=True))
    weights = StepWeights(loss, seed=0, store=store)
    sources = RowSources(RowPolicy(SHARE), 0, lambda step: 7, total_steps=2)
    source = RolloutRows(rows, RolloutLog(folder / "log"), sources) if loss.kind == "policy_gradient" else rows
    with StepLoader(source, train, worker.rank, worker.world_size, worker.device, VOCAB, last_step=2) as loader:
        sums = accumulate_gradients(student, loader, weights, 1, LossState.first(loss), worker, train)
    loss_value = float(worker.sum_over_workers(sums).loss)
    found = {}
    for name, weight in student.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            gradient = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
            found[name.removeprefix("module.")] = gradient.clone()
    return loss_value, found


def rank_main(rank: int, folder: Path) -> None:
    """What each of two processes does: every case, every cut; the first writes what it found."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "rendezvous"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    worker = Worker(rank, 2, torch.device("cpu"))
    found = {
        json.dumps([case, index]): step_gradients(folder, worker, settings, *cut)
        for case, settings in CASES.items()
        for index, cut in enumerate(CUTS)
    }
    for sharding in ("replicate", "fsdp"):
        for case in PACKED:
            found[f"{case}, packed, {sharding}"] = step_gradients(
                folder, worker, CASES[case], sharding, 1, None, tokens=30, packing=True
            )
        packed = TrainConfig(micro_batch_tokens=30, packing=True, sharding=sharding)
        make_student(ModelSource(str(folder / "model")), None, LOSS.validate_python(CASES["atkd"]), packed, worker)
        found[f"bfloat16 {sharding}"] = step_gradients(folder, worker, CASES["atkd"], sharding, 1, None, "bfloat16")
    found["what stays between passes"] = between_passes(folder, worker)
    hand_over(folder, worker)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


def between_passes(folder: Path, worker: Worker) -> dict[str, tuple[int, int, str]]:
    """Numbers of each weight's gradient on this rank after the first of several sharded passes, of its share, and its type."""
    examples, store = ExampleFile(folder / "train.arrow"), ScoreStore(folder / "store")
    train, loss = TrainConfig(sharding="fsdp", precision="bfloat16"), LOSS.validate_python(CASES["atkd"])
    student = distribute(CausalStudent(prepare_model(ModelSource(str(folder / "model")), None, train), loss), train, worker)
    batch = FileRows(examples, store, 8, np.arange(2))
    weights = StepWeights(loss, seed=0, store=store).of_step(batch, [[[0], [1]]], 1, LossState.first(loss))
    set_gradient_sync(student, False)
    forward(student, collate(batch, [worker.rank], VOCAB, weights), LossState.first(loss), train).loss.backward()
    return {
        name: (weight.grad.to_local().numel(), weight.to_local().numel(), str(weight.grad.dtype))  # type: ignore[union-attr]
        for name, weight in student.named_parameters()
    }


def hand_over(folder: Path, worker: Worker) -> None:
    """Leave the weights of a sharded student for its samplers."""
    train, loss = TrainConfig(sharding="fsdp"), LOSS.validate_python(CASES["atkd"])
    source = ModelSource(str(folder / "model"))
    task = TrainingTask(
        name="train", model=source, tokenizer=str(folder / "model"), lora=None, loss=loss, train=train,
        examples=str(folder / "train.arrow"), store=None, top_k=8, wait_seconds=1.0, seed=0, threads=1, gpu=False,
        metrics=str(folder), output=None,
        rollouts=RolloutTask(str(folder / "log"), str(folder / "weights"), RowPolicy(1.0), dtype="float32"),
    )  # fmt: skip
    WeightPublisher(task, worker, total_steps=9).after(make_student(source, None, loss, train, worker), 3)


def written_rows() -> tuple[list[Example], list[TeacherScores], list[Sampled]]:
    """What the student and, in part, the teacher wrote for the first step, as if it had been drawn."""
    generator = np.random.default_rng(8)
    examples = random_examples(int(written_by_student(0, 1, 7, SHARE).sum()), seed=5)
    scores = [scores_from_logits(one, generator.normal(size=(len(one.token_ids), VOCAB)), 8) for one in examples]
    sampled = [
        Sampled(*generator.uniform(-5, -4, (1, len(one.targets))).astype(np.float32), True, 0,
                generator.uniform(-5, -4, len(one.targets)).astype(np.float32))
        for one in examples
    ]  # fmt: skip
    return examples, scores, sampled


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, scores, a model, and what two ranks made of them."""
    folder = tmp_path_factory.mktemp("ranks")
    scored_world(folder, rows=16)
    tiny_llama(folder / "model", seed=1, tied=False)
    log = RolloutLog.open_or_create(folder / "log", {"top_k": 8, "vocab_size": VOCAB}, steps=9, batch_rows=7)
    log.write(1, *written_rows())
    torch.multiprocessing.spawn(rank_main, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("cut", range(len(CUTS)), ids=["ddp", "ddp, adapted head", "fsdp", "fsdp, adapted head"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_loss_and_gradients_of_one(world: Path, case: str, cut: int) -> None:
    _, _, lora = CUTS[cut]
    expected_loss, expected = step_gradients(world, Worker(0, 1, torch.device("cpu")), CASES[case], "replicate", 7, lora)
    loss, found = torch.load(world / "found.pt")[json.dumps([case, cut])]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys() and any("lm_head" in name for name in found)
    assert all(gradient.any() for name, gradient in expected.items()), "every trained weight has a gradient"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sharding", ["replicate", "fsdp"])
@pytest.mark.parametrize("case", PACKED)
def test_two_ranks_that_pack_give_the_loss_and_gradients_of_one_that_does_not(world: Path, case: str, sharding: str) -> None:
    expected_loss, expected = step_gradients(world, Worker(0, 1, torch.device("cpu")), CASES[case], "replicate", 7, None)
    loss, found = torch.load(world / "found.pt")[f"{case}, packed, {sharding}"]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_sharded_weights_are_handed_over_whole(world: Path) -> None:
    handed, wanted = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (world / "weights" / "step-00000003", world / "model")
    )
    assert handed.keys() == wanted.keys() and all(torch.equal(handed[name], weight) for name, weight in wanted.items())
    proof = Proof.read(world / "weights" / "step-00000003")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(world / "model")(torch.from_numpy(proof.token_ids).long()[None]).logits[0]
    expected = logits.log_softmax(dim=1)[:-1].gather(1, torch.from_numpy(proof.token_ids).long()[1:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(proof.logprobs), expected, atol=1e-4, rtol=0)


def test_passes_of_so_many_tokens_give_the_same(world: Path) -> None:
    alone = Worker(0, 1, torch.device("cpu"))
    expected_loss, expected = step_gradients(world, alone, CASES["atkd"], "replicate", 7, None)
    loss, found = step_gradients(world, alone, CASES["atkd"], "replicate", 7, None, tokens=30)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_shards_compute_in_16_bits_as_replicas_do_and_keep_no_whole_gradient(world: Path) -> None:
    found = torch.load(world / "found.pt")
    (whole, replicated), (loss, sharded) = found["bfloat16 replicate"], found["bfloat16 fsdp"]
    exact, gradients = step_gradients(world, Worker(0, 1, torch.device("cpu")), CASES["atkd"], "replicate", 7, None)
    assert whole == pytest.approx(exact, rel=2e-2) and loss == pytest.approx(exact, rel=2e-2)
    for name, gradient in gradients.items():
        off = (sharded[name] - gradient).norm() / gradient.norm()
        assert off < 0.05 and off < 4 * (replicated[name] - gradient).norm() / gradient.norm(), name
    for name, (there, share, dtype) in found["what stays between passes"].items():
        assert (there, dtype) == (share, "torch.float32"), name


def test_a_worker_that_is_to_have_a_gpu_and_sees_none_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"workers\.gpus is 1, but this worker's torch sees no GPU: workers\.gpus=0, or a torch"):
        Worker.here(threads=torch.get_num_threads(), gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a node has GPUs, and the worker asked for none
    assert Worker.here(threads=torch.get_num_threads(), gpu=False).device == torch.device("cpu")
