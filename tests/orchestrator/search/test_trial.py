"""One trial: the training of its point, and that nothing of another trial reaches it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from actors.config.rollouts import ResponsesConfig
from actors.config.workers import WorkersConfig
from actors.examples import ExampleFile, write_examples
from orchestrator.config.run import RunConfig
from orchestrator.search import driver, trial
from orchestrator.search.bound_space import search_of
from orchestrator.search.controller import Assignment, SearchController
from orchestrator.search.driver import DIED, TrialQueue, progress_line
from orchestrator.search.ledger import Ledger
from orchestrator.search.ray_tune import trial_resources
from orchestrator.search.samplers import ListSampler
from orchestrator.search.schedulers import RuleScheduler, StoppingRule
from orchestrator.search.tune import spec_of
from tests.orchestrator.trial_world import RATE, ground_of, measures_of, scored_run, trial_context
from tests.worlds import VOCAB

POINTS = [
    {RATE: 3e-3, "student.lora": {"rank": 2, "dropout": 0.2}},
    {RATE: 1e-2, "loss": {"kind": "coupled", "divergence": "reverse_kl"}},
    {RATE: 3e-3, "loss": {"kind": "atkd", "split": "random"}},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return scored_run(tmp_path_factory.mktemp("trials"))


@pytest.mark.ray
def test_a_trial_measures_the_same_whatever_its_process_did_before(local_ray: None, config: RunConfig, tmp_path: Path) -> None:
    """Bit for bit: adapters and random splits are drawn anew, and nothing of the trial before is left."""
    first = measures_of(config, tmp_path / "a", [Assignment(number, point, 5) for number, point in enumerate(POINTS)])
    other = measures_of(config, tmp_path / "b", [Assignment(number, point, 5) for number, point in enumerate(reversed(POINTS))])
    assert first == list(reversed(other))
    assert len({str(measures) for measures in first}) == len(POINTS)
    seeds = measures_of(config, tmp_path / "c", [Assignment(number, POINTS[2], seed) for number, seed in enumerate((5, 6))])
    assert seeds[0] == first[2] != seeds[1]


def test_the_task_of_a_trial_is_that_of_its_point(config: RunConfig, tmp_path: Path) -> None:
    spec = trial_context(config, tmp_path)
    task = spec.task(Assignment(12, {RATE: 1e-4, "scores.top_k": 4, "train.epochs": 2}, seed=9))
    assert task.train.optimizer.learning_rate == 1e-4 and task.top_k == 4 and task.seed == 9 and task.output is None
    assert task.name == "trial_0012" and task.metrics == str(tmp_path / "trials" / "0012")
    assert task.validation is not None
    assert task.validation.steps == (2, 5, 8), "rungs of its own length"
    assert task.validation.top_k == config.scores.top_k, "all trials are measured alike"


def test_a_trial_of_another_shape_begins_with_a_student_of_its_own_and_all_else_is_as_it_was(tmp_path: Path) -> None:
    shape = {"kind": "scratch", "hidden_size": 16, "layers": 1, "heads": 2}
    context = trial_context(scored_run(tmp_path, student={"model": shape}), tmp_path / "search")
    plain, own, other = (Assignment(3, point, seed=9) for point in (
        {}, {"student.model.hidden_size": 16}, {"student.model.hidden_size": 32}
    ))  # fmt: skip
    assert context.task(own) == context.task(plain), "the run's own shape"
    sizes = [context.draw_student(one) for one in (plain, own, other)]
    assert sizes[0] == sizes[1] == VOCAB * 16 + 16 * (4 * 16 + 3 * 48) + 3 * 16
    assert sizes[2] == VOCAB * 32 + 32 * (4 * 32 + 3 * 96) + 3 * 32
    task = context.task(other)
    assert task.model.name == str(tmp_path / "search" / "trials" / "0003" / "student")
    assert replace(task, model=context.task(plain).model) == context.task(plain)


def test_a_student_of_its_own_is_on_all_nodes_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"kind": "scratch", "hidden_size": 16, "layers": 1, "heads": 2}
    context = trial_context(scored_run(tmp_path, student={"model": shape}), tmp_path / "search")
    there: list[tuple[str, bool]] = []

    def seen(who: str) -> None:
        there.append((who, (context.drawn_student(3) / "model.safetensors").exists()))

    mirror = SimpleNamespace(sync=lambda: seen("here"))
    monkeypatch.setattr(RunConfig, "mirror", mirror)
    monkeypatch.setattr(trial, "sync_other_nodes", lambda told: seen("others") if told is mirror else None)
    context.draw_student(Assignment(3, {"student.model.hidden_size": 32}, seed=9))
    assert there == [("here", True), ("others", True)]


def test_a_trial_learns_from_written_responses_and_is_as_long_as_they_are(config: RunConfig, tmp_path: Path) -> None:
    data = config.run_dir / "data"
    own = ExampleFile(data / "train.arrow")
    write_examples(data / "written.arrow", [own[row] for row in range(len(own))] * 2)
    point = {RATE: 1e-4, "train.epochs": 2}
    plain, written = (
        trial_context(one, tmp_path).task(Assignment(0, point, seed=9))
        for one in (config, config.model_copy(update={"responses": ResponsesConfig(writer="teacher")}))
    )
    assert (plain.examples, written.examples) == (str(data / "train.arrow"), str(data / "written.arrow"))
    assert plain.validation is not None and written.validation is not None
    assert written.validation.steps[-1] == 2 * plain.validation.steps[-1]
    assert written.validation.examples == plain.validation.examples


def test_a_trial_too_short_for_its_rungs_says_so(config: RunConfig, tmp_path: Path) -> None:
    spec = trial_context(config, tmp_path)
    with pytest.raises(ValueError, match=r"tune.rungs is 3, but a trial has 2 optimizer steps.*tune.rungs=2 would do"):
        spec.task(Assignment(0, {"train.epochs": 0.5}, seed=0))


@pytest.mark.ray
def test_interrupted_trials_begin_first_and_a_point_may_set_the_seed(local_ray: None, config: RunConfig, tmp_path: Path) -> None:
    spec = spec_of(config, ground_of(config))
    Ledger(tmp_path / "ledger.jsonl").begin_search(spec)
    none = RuleScheduler(StoppingRule("none", "min"))
    controller = ray.remote(SearchController).options(num_cpus=0).remote(tmp_path / "ledger.jsonl", spec, none)
    waiting = [Assignment(1, {RATE: 3e-3}, seed=8)]
    queue = TrialQueue(controller, tmp_path, ListSampler([{RATE: 1e-3}, {"seed": 4}]), waiting, first=3, seed=2)
    assert [queue.begin_next() for _ in range(4)] == [1, 3, 4, None]
    (tmp_path / "0001").mkdir()
    steps = [{"step": 1, "tokens": 90}, {"step": 2, "tokens": 60}]
    (tmp_path / "0001" / "trial_0001.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps) + '{"step": 3, "to')
    queue.over(1, died=True)
    search = ray.get(controller.search.remote())
    ended = search.trials[0].ended
    assert ended is not None and (ended.step, ended.student_tokens) == (2, 150), "what its process had done is on the bill"
    assert [(trial.number, trial.begun.seed) for trial in search.trials] == [(1, 8), (3, 2), (4, 4)]
    assert search.error(search.trials[0]) == DIED
    assert progress_line(search, at_once=2).startswith("1/1 trials done (1 failed), 2 running, 00:00:00 left")
    ray.kill(controller)


def test_a_trial_holds_what_it_needs_and_leaves_the_cpus_to_the_workers_of_ray_train() -> None:
    workers = WorkersConfig(count=2, cpus=1.5, gpus=1, resources={"student_node": 1}, labels={"role": "student"})
    alone, beside = trial_resources(workers, in_process=True), trial_resources(workers, in_process=False)
    assert alone.bundles == [{"CPU": 1.5, "GPU": 1, "student_node": 1}]
    assert not beside.required_resources.get("CPU") and not beside.required_resources.get("GPU")


@pytest.mark.ray
def test_an_interrupted_search_ends_its_ledger_before_its_teacher(
    local_ray: None, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial whose teacher is gone would else be told of as failed, and not run again when the search resumes."""
    search, told, seen = search_of(config), [], []

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    @contextmanager
    def teacher() -> Iterator[None]:
        try:
            yield
        finally:
            try:
                ray.get(told[0].search.remote(), timeout=20)
            except RayActorError:
                seen.append("the ledger's keeper is gone")

    def queue_of(controller: Any, trials: Path) -> Any:
        told.append(controller)

    monkeypatch.setattr(driver, "run_trials", interrupted)
    inputs = replace(ground_of(config), serve_teacher=teacher)
    spec = spec_of(config, inputs)
    driver.begin_ledger(tmp_path, spec)
    with pytest.raises(KeyboardInterrupt):
        driver.run_search(
            search, inputs, tmp_path, spec, RuleScheduler(StoppingRule("none", "min")), queue_of, in_process=True, concurrent=1
        )
    assert seen == ["the ledger's keeper is gone"]
