"""A student that learns by policy gradient from what it writes: against the same written plainly."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from actors.model_source import ModelSource
from actors.rollouts.mixed_writing import MixedWriters
from actors.student import loop
from losses.config import PolicyGradientLoss
from tests.actors.rollouts.mixed_world import Together
from tests.actors.student.test_on_policy import STEPS, Run, _one_load_at_a_time  # noqa: F401

MINILLM = PolicyGradientLoss(kind="policy_gradient")


def plain_training(run: Run, teacher_share: float) -> nn.Module:
    """MiniLLM with loops, on the rows that the run has drawn: the student as it is then is the one that wrote them."""
    teacher = AutoModelForCausalLM.from_pretrained(run.teacher_folder).eval()
    student = AutoModelForCausalLM.from_pretrained(run.student_folder)
    optimizer = SGD(student.parameters(), run.train.optimizer.learning_rate)
    for step in range(1, STEPS + 1):
        written = run.log.examples(step)
        rows = [(len(run.examples[row].last_prompt), written[place].token_ids.tolist()) for place, row in enumerate(written.rows)]
        exact, logprobs, advantages, weights = torch.zeros(()), [], [], []
        for first, text in rows:
            ids, new = torch.tensor([text]), torch.tensor(text[first:])[:, None]
            with torch.no_grad():
                p = teacher(input_ids=ids).logits[0, first - 1 : -1].log_softmax(dim=1)
            q = student(input_ids=ids).logits[0, first - 1 : -1].log_softmax(dim=1)
            exact = exact + (q.exp() * (q - p)).sum()
            logprobs.append(q.gather(1, new).flatten())
            of_teacher = p.gather(1, new).flatten()
            mixture = teacher_share * of_teacher.exp() + (1 - teacher_share) * logprobs[-1].detach().exp()
            weights += (logprobs[-1].detach().exp() / mixture).tolist()
            rewards = ((of_teacher - logprobs[-1]) / 0.5).tolist()
            advantages += [sum(rewards[here + 1 :]) / (len(rewards) - here) for here in range(len(rewards))]
        mean = sum(advantages) / len(advantages)
        deviation = math.sqrt(sum((one - mean) ** 2 for one in advantages) / len(advantages) + 1e-8)
        whitened = torch.tensor([weight * (one - mean) / deviation for one, weight in zip(advantages, weights, strict=True)])
        loss = (exact - (whitened * torch.cat(logprobs)).sum()) / len(advantages)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), run.train.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return student


@pytest.fixture(autouse=True)
def _plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's first steps follow the sign of a gradient, which in a weight that has nearly none is that of its rounding."""
    monkeypatch.setattr(loop, "make_optimizer", lambda student, config: SGD(student.parameters(), config.learning_rate))


def mixed(run: Run, teacher_share: float) -> Run:
    """Have the teacher draw some of the tokens; the plan of the run knows it."""
    teacher = replace(run.spec, model=ModelSource(str(run.teacher_folder)))
    run.samplers = MixedWriters(Together(run.spec), Together(teacher), teacher_share)  # type: ignore[arg-type, assignment]
    return run


@pytest.mark.parametrize("teacher_share", [0.0, 0.4])
def test_the_student_learns_as_a_plain_minillm_does(tmp_path: Path, teacher_share: float) -> None:
    run = Run(tmp_path, learning_rate=0.1, loss=MINILLM, teacher_share=teacher_share)
    (mixed(run, teacher_share) if teacher_share else run).go()
    student = plain_training(run, teacher_share)
    before = AutoModelForCausalLM.from_pretrained(run.student_folder).state_dict()
    for name, weight in student.state_dict().items():
        torch.testing.assert_close(run.weights[name], weight, atol=1e-5, rtol=0)
        assert (weight - before[name]).abs().max() > 1e-3, "it has moved far beyond the tolerance"
    shares = [facts.numbers.get("effective_share", 1.0) for facts in run.facts]
    assert all(0 < share < 1 for share in shares) if teacher_share else set(shares) == {1.0}
