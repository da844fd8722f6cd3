"""A student that learns from what it writes: the loop, the writer of steps, samplers and teacher, all in this process."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForCausalLM

from actors.config.models import EngineConfig, LoraAdapter, TrainConfig
from actors.dataloader.row_sources import RowPolicy, RowSources, written_by_student
from actors.dataloader.sampler import StepSampler
from actors.engines.base import TeacherSpec
from actors.engines.transformers import TransformersEngine
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores
from actors.rollouts.base import Prompt, SamplerSpec, Sampling, seed_of
from actors.rollouts.step_writer import RolloutPlan, StepFacts, StepWriter
from actors.rollouts.transformers_sampler import TransformersSampler, draw
from actors.rollouts.weights import Proof, WeightFolders
from actors.rollouts.workers import RolloutWorker, Weights, Written
from actors.score_store.rollout_log import RolloutLog
from actors.score_store.store import ScoringFailed
from actors.student.checkpoint import Progress, load_checkpoint, save_checkpoint
from actors.student.loop import distil
from actors.student.optimizer import make_optimizer
from actors.student.ranks import Worker
from actors.student.task import RolloutTask, TrainingTask
from actors.student.train_checkpoints import NoCheckpoints
from losses.config import AtkdLoss, CoupledLoss
from tests.worlds import VOCAB, scored_world, tiny_llama, word_tokenizer

ROWS, BATCH, STEPS, NEW_TOKENS = 24, 4, 6, 8
ENGINE = EngineConfig(kind="transformers", dtype="float32")
ENDS = (0, 7, 19, 33, 50)


@pytest.fixture(autouse=True)
def _one_load_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop and samplers, elsewhere processes, are threads here, and transformers loads one model at a time in a process."""
    lock, load = threading.Lock(), AutoModelForCausalLM.from_pretrained

    def locked(*arguments: Any, **settings: Any) -> Any:
        with lock:
            return load(*arguments, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", locked)


class Here:
    """Samplers in this process."""

    def __init__(self, spec: SamplerSpec) -> None:
        self._worker = RolloutWorker(spec, None)
        self.by_step: dict[int, int] = {}
        """Which weights wrote each step."""

    def write(self, weights: Weights, prompts: Sequence[Prompt]) -> Written:
        self.by_step[prompts[0].step] = weights.step
        return self._worker.write(weights, prompts)


class Teacher:
    """The teacher's engine, asked as the service is."""

    def __init__(self, spec: TeacherSpec) -> None:
        self._engine = TransformersEngine(spec)

    def score(self, examples: Sequence[Example]) -> dict[str, TeacherScores]:
        return {score.key: score for score in self._engine.score(list(examples))}


class Run:
    """One training with rollouts in a folder."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, settings = folder, {"student_share": 1.0, "refresh_steps": 1, "lag": 0, **changes}
        top_k, self.lora = settings.pop("top_k", VOCAB - 1), settings.pop("lora", None)
        tied, loss = settings.pop("tied", True), settings.pop("loss", CoupledLoss(kind="coupled"))
        wire, teacher_share = settings.pop("wire", "top_k"), settings.pop("teacher_share", 0.0)
        told: dict[str, Any] = {}
        if settings.get("adaptive"):
            heldout, heldout_store = scored_world(folder / "heldout", rows=5, top_k=top_k, seed=9)
            settings["shares"] = str(folder / "shares.json")
            told = {"heldout": str(heldout), "heldout_store": str(Path(heldout_store.place)), "heldout_batch_rows": 3}
        examples, store = scored_world(folder / "world", rows=ROWS, top_k=top_k)
        self.teacher_folder = tiny_llama(folder / "teacher", seed=1)
        # With seed 2 a draw of step 6 lies within rounding of its border.
        self.student_folder = tiny_llama(folder / "student", seed=3, tied=tied)
        word_tokenizer().save_pretrained(folder / "tokenizer")
        self.examples, student = ExampleFile(examples), ModelSource(str(self.student_folder))
        rate = settings.pop("learning_rate", 0.02)
        optimizer = {"learning_rate": rate, "schedule": "constant_with_warmup", "warmup_ratio": 0.0}
        self.train = TrainConfig.model_validate(
            {"batch_rows": BATCH, "micro_batch_rows": 3, "optimizer": optimizer, "checkpoint_every_steps": 2}
        )
        longest = max(len(self.examples[row].last_prompt) for row in range(ROWS))
        noted, teacher = top_k if wire == "candidates" else 0, ModelSource(str(self.teacher_folder))
        self.spec = SamplerSpec(ENGINE, student, Sampling(NEW_TOKENS, seed=3), ENDS, longest, candidates=noted)
        self.teacher_spec = TeacherSpec(ENGINE, teacher, top_k, longest + NEW_TOKENS, wire=wire)
        sampler, policy = StepSampler(ROWS, BATCH, seed=3, store_order_first=True), RowPolicy(**settings)
        sources = RowSources(policy, 3, sampler.rows_of, STEPS)
        self.plan = RolloutPlan(self.examples, sampler, STEPS, sources, None, student, teacher_share=teacher_share)
        identity = {"top_k": top_k, "vocab_size": VOCAB, "wire": wire, "hidden_size": 16 if wire == "hidden" else 0}
        self.log = RolloutLog.open_or_create(folder / "log", identity, STEPS, BATCH)
        self.task = TrainingTask(
            name="train", model=student, tokenizer=str(folder / "tokenizer"), lora=self.lora, loss=loss, train=self.train,
            examples=str(examples), store=str(Path(store.place)) if settings["student_share"] < 1 or told else None, top_k=top_k,
            wait_seconds=60.0, seed=3, threads=1, gpu=False, metrics=str(folder / "metrics"), output=str(folder / "out"),
            rollouts=RolloutTask(
                str(folder / "log"), str(folder / "weights"), policy, "float32", head_of=teacher if wire == "hidden" else None,
                **told,
            ),
        )  # fmt: skip
        self.facts: list[StepFacts] = []
        self.samplers = Here(self.spec)

    def writer(self) -> StepWriter:
        teacher = Teacher(self.teacher_spec)
        return StepWriter(self.plan, self.log, WeightFolders(self.folder / "weights"), self.samplers, teacher, self.facts.append)  # type: ignore[arg-type]

    def go(self, checkpoints: Any = None) -> None:
        """Train, with the writer beside it."""
        over, failures = threading.Event(), []
        writer = self.writer()  # here, since transformers loads one model at a time in a process

        def write() -> None:
            try:
                writer.run(over)
            except Exception as error:
                failures.append(error)
                self.log.declare_failed(str(error))

        thread = threading.Thread(target=write)
        thread.start()
        try:
            distil(self.task, checkpoints or NoCheckpoints())
        finally:
            over.set()
            thread.join()
        assert not failures

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return AutoModelForCausalLM.from_pretrained(self.folder / "out").state_dict()


def plain_training(run: Run) -> tuple[nn.Module, list[list[list[int]]]]:
    """The same written plainly: each row is drawn token by token from the model as it is, and learned from the dense teacher."""
    teacher = AutoModelForCausalLM.from_pretrained(run.teacher_folder).eval()
    student = AutoModelForCausalLM.from_pretrained(run.student_folder)
    optimizer, texts = make_optimizer(student, run.train.optimizer), []
    for step in range(1, STEPS + 1):
        rows = []
        for row in range((step - 1) * BATCH, step * BATCH):
            prompt = run.examples[row].last_prompt
            generator = np.random.default_rng(seed_of(run.spec.sampling, Prompt(prompt, row, step=step)))
            text: list[int] = prompt.tolist()
            while len(text) < len(prompt) + NEW_TOKENS and not (len(text) > len(prompt) and text[-1] in ENDS):
                with torch.no_grad():
                    logits = student(input_ids=torch.tensor([text])).logits[0, -1]
                text.append(draw(logits.double().log_softmax(dim=0), run.spec.sampling, generator))
            rows.append((len(prompt), text))
        texts.append([text for _, text in rows])
        targets = sum(len(text) - first for first, text in rows)
        loss = torch.zeros(())
        for first, text in rows:
            ids = torch.tensor([text])
            with torch.no_grad():
                p = teacher(input_ids=ids).logits[0, first - 1 : -1].log_softmax(dim=1)
            q = student(input_ids=ids).logits[0, first - 1 : -1].log_softmax(dim=1)
            loss = loss + (p.exp() * (p - q)).sum() / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), run.train.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return student, texts


def test_the_student_learns_as_a_plain_on_policy_training_does(tmp_path: Path) -> None:
    run = Run(tmp_path, learning_rate=2e-3)
    run.go()
    student, texts = plain_training(run)
    for step in range(1, STEPS + 1):
        rows = run.log.examples(step)
        assert [rows[row].token_ids.tolist() for row in range(len(rows))] == texts[step - 1], step
    before = AutoModelForCausalLM.from_pretrained(run.student_folder).state_dict()
    for name, weight in student.state_dict().items():
        torch.testing.assert_close(run.weights[name], weight, atol=1e-4, rtol=0)
        assert (weight - before[name]).abs().max() > 5e-3, "it has moved far beyond the tolerance"
    assert run.samplers.by_step == {step: step - 1 for step in range(1, STEPS + 1)}
    assert [facts.step for facts in run.facts] == list(range(1, STEPS + 1))
    assert all(facts.numbers["staleness_steps"] == 0 for facts in run.facts)
    assert all(facts.numbers["hand_over_gap"] < 1e-5 for facts in run.facts[1:]) and "hand_over_gap" not in run.facts[0].numbers
    lines = [json.loads(line) for line in (tmp_path / "metrics" / "train.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [sum(len(text) for text in step) for step in texts]


@pytest.mark.parametrize(("refresh_steps", "lag", "expected"), [
    (2, 0, [0, 0, 2, 2, 4, 4]), (1, 1, [0, 0, 1, 2, 3, 4]), (2, 1, [0, 0, 0, 0, 2, 2]), (4, 0, [0, 0, 0, 0, 4, 4]),
])  # fmt: skip
def test_rows_are_written_by_the_weights_of_their_window(
    tmp_path: Path, refresh_steps: int, lag: int, expected: list[int]
) -> None:
    run = Run(tmp_path, refresh_steps=refresh_steps, lag=lag)
    run.go()
    assert [run.samplers.by_step[step] for step in range(1, STEPS + 1)] == expected
    assert [run.log.sampled(step)[0].weights_step for step in range(1, STEPS + 1)] == expected
    assert not list((tmp_path / "weights").glob("*")), "none is left once nobody waits"


class Killed(Exception):
    """In the place of a process that ends."""


class Checkpoints:
    """Checkpoints in a folder; the training dies once it has saved the one after a step."""

    def __init__(self, folder: Path, dies_after: int | None) -> None:
        self._folder, self._dies_after = folder, dies_after

    def load(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, worker: Worker) -> Progress | None:
        found = sorted(self._folder.glob("step-*"))
        return load_checkpoint(found[-1], student, optimizer, schedule) if found else None

    def save(
        self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, worker: Worker
    ) -> None:
        folder = self._folder / f"step-{progress.step}"
        folder.mkdir(parents=True)
        save_checkpoint(folder, student, optimizer, schedule, progress, 0)
        if progress.step == self._dies_after:
            raise Killed


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_training_that_is_killed_ends_with_the_same_weights(tmp_path: Path, share: float, lag: int) -> None:
    settings: dict[str, Any] = {"student_share": share, "lag": lag, "top_k": 8, "loss": AtkdLoss(kind="atkd")}
    whole = Run(tmp_path / "whole", **settings)
    whole.go()
    run = Run(tmp_path / "killed", **settings)
    with pytest.raises(Killed):
        run.go(Checkpoints(tmp_path / "checkpoints", dies_after=2))
    if lag == 0:
        run.log.discard(3)  # as if it had been killed while that was written
    again = Run(tmp_path / "killed", **settings)
    again.go(Checkpoints(tmp_path / "checkpoints", dies_after=None))
    for name, weight in whole.weights.items():
        assert torch.equal(weight, again.weights[name]), name
    assert set(again.samplers.by_step).isdisjoint(set(run.samplers.by_step) - {3}), "what was there is not written anew"


def test_rows_that_stay_are_the_datas_and_those_of_the_student_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path, student_share=0.5, top_k=8)
    run.go()
    for step in range(1, STEPS + 1):
        mask = written_by_student(3, step, BATCH, 0.5)
        wanted = [int(row) for row in np.arange((step - 1) * BATCH, step * BATCH)[mask]]
        if wanted:
            rows = run.log.examples(step)
            assert rows.rows.tolist() == wanted
            for place, row in enumerate(wanted):
                prompt = run.examples[row].last_prompt
                assert rows[place].token_ids[: len(prompt)].tolist() == prompt.tolist()
                assert rows[place].loss_mask.tolist() == [place >= len(prompt) for place in range(len(rows[place].token_ids))]
        else:
            assert not run.log.is_there(step)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, LoraAdapter(rank=2, modules=("q_proj", "lm_head"))], ids=["full", "adapters"])
def test_what_is_handed_over_predicts_what_the_student_predicts(tmp_path: Path, lora: LoraAdapter | None, tied: bool) -> None:
    run = Run(tmp_path, lora=lora, tied=tied)
    seen: list[float] = []

    class Kept(Here):
        def write(self, weights: Weights, prompts: Sequence[Prompt]) -> Written:
            if weights.proof is not None:
                begun = TransformersSampler(self._worker._spec).logprobs(weights.proof.token_ids)
                seen.append(float(np.abs(begun - weights.proof.logprobs).max()))
            return super().write(weights, prompts)

    run.samplers = Kept(run.spec)
    run.go()
    assert len(seen) == STEPS - 1 and min(seen) > 0.01, "the student was another than at the beginning"
    assert all(facts.numbers["hand_over_largest_gap"] < 1e-4 for facts in run.facts[1:])


def test_a_failure_of_the_writer_ends_the_training_with_its_words(tmp_path: Path) -> None:
    run = Run(tmp_path)

    class Broken(Here):
        def write(self, weights: Weights, prompts: Sequence[Prompt]) -> Written:
            if prompts[0].step == 3:
                raise ValueError("the sampler fell over")
            return super().write(weights, prompts)

    run.samplers = Broken(run.spec)
    with pytest.raises(ScoringFailed, match="the sampler fell over"):
        run.go()


def test_a_proof_is_read_as_it_was_written(tmp_path: Path) -> None:
    proof = Proof(np.array([3, 1, 4], np.int32), np.array([-0.5, -2.25], np.float32))
    proof.write(tmp_path)
    found = Proof.read(tmp_path)
    assert found.token_ids.tolist() == [3, 1, 4] and found.logprobs.tolist() == [-0.5, -2.25]
