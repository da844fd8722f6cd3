"""A student that learns by policy gradient from what it writes: against the same written plainly."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from actors.model_source import ModelSource
from actors.student import loop
from losses.config import PolicyGradientLoss
from tests.actors.rollouts.mixed_world import mixed_writers
from tests.actors.student.test_on_policy import STEPS, Checkpoints, Killed, Run, _one_load_at_a_time  # noqa: F401

MINILLM = PolicyGradientLoss(kind="policy_gradient")


def plain_training(run: Run) -> nn.Module:
    """MiniLLM with loops, on the rows that the run has drawn, by the student as it was at the beginning of their window."""
    teacher = AutoModelForCausalLM.from_pretrained(run.teacher_folder).eval()
    student = AutoModelForCausalLM.from_pretrained(run.student_folder)
    optimizer = SGD(student.parameters(), run.train.optimizer.learning_rate)
    share, window = run.plan.teacher_share, run.plan.sources.policy.refresh_steps
    for first in range(1, STEPS + 1, window):
        then = copy.deepcopy(student).eval()
        for _ in range(run.plan.sources.policy.inner_epochs):
            for step in range(first, min(first + window, STEPS + 1)):
                plain_loss(run, step, share, teacher, then, student).backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), run.train.optimizer.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
    return student


def plain_loss(run: Run, step: int, share: float, teacher: nn.Module, then: nn.Module, student: nn.Module) -> torch.Tensor:
    """Of the rows of a step."""
    written = run.log.examples(step)
    exact, advantages, weights, ratios = torch.zeros(()), [], [], []
    for place, row in enumerate(written.rows):
        first, text = len(run.examples[row].last_prompt), written[place].token_ids.tolist()
        new = torch.tensor(text[first:])[:, None]
        p, s, q = (
            model(input_ids=torch.tensor([text])).logits[0, first - 1 : -1].log_softmax(dim=1)
            for model in (teacher, then, student)
        )
        exact = exact + (q.exp() * (q - p.detach())).sum()
        of_teacher, of_writer = (logs.detach().gather(1, new).flatten() for logs in (p, s))
        ratios.append((q.gather(1, new).flatten() - of_writer).exp())
        weights += (of_writer.exp() / (share * of_teacher.exp() + (1 - share) * of_writer.exp())).tolist()
        rewards = ((of_teacher - of_writer) / 0.5).tolist()
        advantages += [sum(rewards[here + 1 :]) / (len(rewards) - here) for here in range(len(rewards))]
    mean = sum(advantages) / len(advantages)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in advantages) / len(advantages) + 1e-8)
    whitened = torch.tensor([weight * (one - mean) / deviation for one, weight in zip(advantages, weights, strict=True)])
    ratio = torch.cat(ratios)
    policy = torch.maximum(-whitened * ratio, -whitened * ratio.clamp(0.8, 1.2))
    return (exact + policy.sum()) / len(advantages)


@pytest.fixture(autouse=True)
def _plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's first steps follow the sign of a gradient, which in a weight that has nearly none is that of its rounding."""
    monkeypatch.setattr(loop, "make_optimizer", lambda student, config: SGD(student.parameters(), config.learning_rate))


def mixed(run: Run, teacher_share: float) -> Run:
    """Have the teacher draw some of the tokens; the plan of the run knows it."""
    run.samplers = mixed_writers(run.spec, ModelSource(str(run.teacher_folder)), teacher_share)  # type: ignore[assignment]
    return run


@pytest.mark.parametrize("settings", [
    {}, {"teacher_share": 0.4}, {"refresh_steps": 2, "inner_epochs": 3},
    {"refresh_steps": 4, "inner_epochs": 2, "teacher_share": 0.4},
], ids=str)  # fmt: skip
def test_the_student_learns_as_a_plain_minillm_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = Run(tmp_path, learning_rate=0.1, loss=MINILLM, **settings)
    if run.plan.teacher_share:
        mixed(run, run.plan.teacher_share)
    run.go()
    student = plain_training(run)
    before = AutoModelForCausalLM.from_pretrained(run.student_folder).state_dict()
    for name, weight in student.state_dict().items():
        torch.testing.assert_close(run.weights[name], weight, atol=1e-5, rtol=0)
        assert (weight - before[name]).abs().max() > 1e-3, "it has moved far beyond the tolerance"
    shares = [facts.numbers.get("effective_share", 1.0) for facts in run.facts]
    assert all(0 < share < 1 for share in shares) if run.plan.teacher_share else set(shares) == {1.0}
    clipped = [line["clipped_share"] for line in lines_of(run)]
    assert any(clipped) == (run.plan.sources.policy.inner_epochs > 1), "once it has moved"
    assert len(clipped) == STEPS * run.plan.sources.policy.inner_epochs


def lines_of(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics" / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("lag", "expected"), [(0, [0, 0, 0, 0, 8, 8]), (1, [0, 0, 0, 0, 0, 0])])
def test_rows_that_are_visited_again_are_the_same(tmp_path: Path, lag: int, expected: list[int]) -> None:
    run = Run(tmp_path, loss=MINILLM, refresh_steps=4, inner_epochs=2, lag=lag)
    run.go()
    assert [run.samplers.by_step[step] for step in range(1, STEPS + 1)] == expected
    assert [facts.numbers["staleness_steps"] for facts in run.facts] == [
        first - 1 - taken for first, taken in zip((1, 2, 3, 4, 9, 10), expected, strict=True)
    ]
    lines = lines_of(run)
    visits = [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 5, 6]
    assert [line["tokens"] for line in lines] == [int(run.log.examples(deal).lengths.sum()) for deal in visits]
    assert [line["epoch"] for line in lines] == pytest.approx([one / 6 for one in (1, 2, 3, 4, 4, 4, 4, 4, 5, 6, 6, 6)])
    assert {line["total_steps"] for line in lines} == {12}
    assert not list((tmp_path / "weights").glob("*")), "none is left once nobody waits"


def test_a_training_of_several_visits_that_is_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"loss": MINILLM, "refresh_steps": 2, "inner_epochs": 2, "teacher_share": 0.3}
    whole = mixed(Run(tmp_path / "whole", **settings), 0.3)
    whole.go()
    run = mixed(Run(tmp_path / "killed", **settings), 0.3)
    with pytest.raises(Killed):
        run.go(Checkpoints(tmp_path / "checkpoints", dies_after=6))
    again = mixed(Run(tmp_path / "killed", **settings), 0.3)
    again.go(Checkpoints(tmp_path / "checkpoints", dies_after=None))
    for name, weight in whole.weights.items():
        assert torch.equal(weight, again.weights[name]), name
    written = [{facts.step for facts in one.facts} for one in (run, again)]
    assert written[0] | written[1] == set(range(1, STEPS + 1)) and not written[0] & written[1], "none is written anew"


def test_a_killed_training_of_mixed_rows_that_lost_a_step_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"loss": MINILLM, "teacher_share": 0.3}
    whole = mixed(Run(tmp_path / "whole", **settings), 0.3)
    whole.go()
    run = mixed(Run(tmp_path / "killed", **settings), 0.3)
    with pytest.raises(Killed):
        run.go(Checkpoints(tmp_path / "checkpoints", dies_after=2))
    run.log.discard(3)
    again = mixed(Run(tmp_path / "killed", **settings), 0.3)
    again.go(Checkpoints(tmp_path / "checkpoints", dies_after=None))
    assert all(torch.equal(weight, again.weights[name]) for name, weight in whole.weights.items())
