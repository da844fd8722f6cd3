"""Whole trainings on the student's own text, by what the teacher says of each token: sampled, scored, logged and learned from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.model_source import ModelSource
from actors.records import NO_TOKEN, Example
from losses.config import CoupledLoss
from losses.divergence_config import ReverseKL
from tests.actors.student import test_on_policy as on_policy
from tests.actors.student.test_on_policy import Run, plain_training
from tests.worlds import tiny_llama

REVERSE = CoupledLoss(kind="coupled", divergence=ReverseKL())
one_load_at_a_time = on_policy._one_load_at_a_time


def logprobs_of(model: PreTrainedModel, example: Example) -> torch.Tensor:
    """[N, V] at a row's targets, by a plain forward pass."""
    with torch.no_grad():
        logits = model(torch.from_numpy(example.token_ids.astype(np.int64))[None]).logits[0]
    return logits[example.target_positions - 1].double().log_softmax(dim=1)


def first_loss(folder: Path) -> float:
    return float(json.loads((folder / "metrics" / "train.jsonl").read_text().splitlines()[0])["loss"])


def test_the_log_has_what_both_hold_most_likely_and_the_loss_is_nearer_to_the_whole_teachers(tmp_path: Path) -> None:
    top_k = 6
    runs = {wire: Run(tmp_path / wire, wire=wire, top_k=top_k, loss=REVERSE) for wire in ("top_k", "candidates")}
    for run in runs.values():
        run.go()
    run = runs["candidates"]
    teacher, student = (AutoModelForCausalLM.from_pretrained(one).eval() for one in (run.teacher_folder, run.student_folder))
    values, rows = [], run.log.examples(1)
    for row in range(len(rows)):
        p, q = logprobs_of(teacher, rows[row]), logprobs_of(student, rows[row])
        values.append((q.exp() * (q - p)).sum(dim=1))
        scores = run.log.scores(1, row, top_k)
        assert scores.topk_ids.shape == (len(rows[row].targets), 2 * top_k)
        for target, mine, theirs, ids in zip(rows[row].targets.tolist(), p, q, scores.topk_ids.tolist(), strict=True):
            own = [token for token in mine.argsort(descending=True).tolist() if token != target][:top_k]
            union = {*own, *theirs.topk(top_k).indices.tolist()} - {target}
            assert sorted(set(ids) - {NO_TOKEN}) == sorted(union)
    dense = float(torch.cat(values).mean())
    gaps = {wire: abs(first_loss(tmp_path / wire) - dense) / dense for wire in runs}
    assert gaps["candidates"] < 0.8 * gaps["top_k"]


@pytest.mark.parametrize("cut", [{}, {"micro_batch_tokens": 64, "packing": True}])
def test_hidden_states_teach_what_the_whole_teacher_teaches(tmp_path: Path, cut: dict[str, Any]) -> None:
    run = Run(tmp_path, learning_rate=2e-3, wire="hidden", top_k=4)
    run.task = replace(run.task, train=run.task.train.model_copy(update=cut))
    run.go()
    student, texts = plain_training(run)
    rows = run.log.examples(1)
    assert [rows[row].token_ids.tolist() for row in range(len(rows))] == texts[0]
    before = AutoModelForCausalLM.from_pretrained(run.student_folder).state_dict()
    for name, weight in student.state_dict().items():
        assert (run.weights[name] - weight).abs().mean() < 0.05 * (weight - before[name]).abs().mean(), name


def test_a_head_that_is_not_the_teachers_ends_the_training(tmp_path: Path) -> None:
    run = Run(tmp_path, wire="hidden", top_k=4)
    assert run.task.rollouts is not None
    other = ModelSource(str(tiny_llama(tmp_path / "other", seed=9)))
    run.task = replace(run.task, rollouts=replace(run.task.rollouts, head_of=other))
    with pytest.raises(ValueError, match="the teacher's head times its hidden states is .* nats from what the teacher said"):
        run.go()


@pytest.mark.parametrize("wire", ["candidates", "hidden"])
def test_a_training_goes_on_from_what_is_in_the_log(tmp_path: Path, wire: str) -> None:
    whole, again = Run(tmp_path / "whole", wire=wire, top_k=8, loss=REVERSE), tmp_path / "again"
    whole.go()
    first = Run(again, wire=wire, top_k=8, loss=REVERSE)
    first.go()
    first.log.discard(4)  # as if it had been killed while that was written
    shutil.rmtree(again / "out")
    second = Run(again, wire=wire, top_k=8, loss=REVERSE)
    second.go()
    assert all(torch.equal(weight, second.weights[name]) for name, weight in whole.weights.items())
