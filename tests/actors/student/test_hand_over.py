"""What a student hands to samplers that compute in bfloat16 holds its small updates, adapters or not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config.models import LoraAdapter, TrainConfig
from actors.config.rollouts import AdaptiveShareConfig
from actors.dataloader.row_sources import AdaptiveShares, Change, RowPolicy
from actors.examples import write_examples
from actors.model_source import ModelSource
from actors.rollouts.weights import WeightFolders
from actors.score_store.rollout_log import RolloutLog
from actors.student.causal_lm import CausalStudent, prepare_model
from actors.student.hand_over import WeightPublisher
from actors.student.ranks import Worker
from actors.student.task import RolloutTask, TrainingTask
from losses.config import CoupledLoss
from tests.worlds import VOCAB, random_examples, tiny_llama

UPDATE = 3e-5
"""Of each weight: less than half of what bfloat16 tells apart at the size of most of them."""


@pytest.mark.parametrize("lora", [None, LoraAdapter(rank=2, modules="all-linear")], ids=["weights", "adapters"])
def test_updates_that_bfloat16_cannot_hold_arrive_in_the_mean(lora: LoraAdapter | None, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", seed=0, hidden_size=64)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "model")
    write_examples(tmp_path / "train.arrow", random_examples(3, seed=1))
    RolloutLog.open_or_create(tmp_path / "log", {"top_k": 8, "vocab_size": VOCAB, "wire": "top_k", "hidden_size": 0}, 9, 4)
    task = TrainingTask(
        name="train", model=ModelSource(str(tmp_path / "model")), tokenizer=str(tmp_path / "model"), lora=lora,
        loss=CoupledLoss(kind="coupled"), train=TrainConfig(), examples=str(tmp_path / "train.arrow"), store=None, top_k=8,
        wait_seconds=1.0, seed=0, threads=1, gpu=False, metrics=str(tmp_path), output=None,
        rollouts=RolloutTask(str(tmp_path / "log"), str(tmp_path / "weights"), RowPolicy(1.0), dtype="bfloat16"),
    )  # fmt: skip
    student = CausalStudent(prepare_model(task.model, lora, task.train), task.loss)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if lora is None:
                weight.add_(UPDATE)
            elif "lora_" in name:  # of rank 2: B A is the update everywhere
                scale = (UPDATE / 2 / (lora.scale / lora.rank)) ** 0.5
                weight.fill_(scale)
    WeightPublisher(task, Worker.here(1, gpu=False), total_steps=9).after(student, 3)
    folder = WeightFolders(tmp_path / "weights").place(3)
    there = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert there.dtype == torch.bfloat16
    before = plain.state_dict()
    gains = [
        (weight.double() - before[name].double()).numpy().ravel()
        for name, weight in there.state_dict().items() if "_proj" in name
    ]  # fmt: skip
    gained = np.concatenate(gains)
    spread = gained.std() / len(gained) ** 0.5
    assert gained.mean() == pytest.approx(UPDATE, abs=5 * spread) and 5 * spread < UPDATE / 2
    assert (gained == 0).mean() > 0.5, "each weight for itself mostly stays"


@pytest.mark.parametrize("decided", [True, False], ids=["after the share was written", "before"])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_workers_ask_the_first_once_whatever_each_would_see(
    rank: int, decided: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of a window is decided by the first worker alone; others may look before it is written."""
    shares = str(tmp_path / "shares.json")
    if decided:
        AdaptiveShares(shares).write(2, [Change(0, 0.0, 2.0)])
    RolloutLog.open_or_create(tmp_path / "log", {"top_k": 8, "vocab_size": VOCAB}, 9, 4)
    policy = RowPolicy(1.0, adaptive=AdaptiveShareConfig(), shares=shares)
    task = TrainingTask(
        name="train", model=ModelSource("none"), tokenizer="none", lora=None, loss=CoupledLoss(kind="coupled"),
        train=TrainConfig(), examples="none", store=None, top_k=8, wait_seconds=1.0, seed=0, threads=1, gpu=False,
        metrics=str(tmp_path), output=None,
        rollouts=RolloutTask(str(tmp_path / "log"), str(tmp_path / "weights"), policy, dtype="bfloat16"),
    )  # fmt: skip
    asked: list[bool] = []
    monkeypatch.setattr(Worker, "agree", lambda worker, told: (asked.append(told), False)[1])
    WeightPublisher(task, Worker(rank, 2, torch.device("cpu")), total_steps=9).after(torch.nn.Linear(1, 1), 2)
    assert asked == [rank == 0 and not decided], "a share of nothing wants no weights"
