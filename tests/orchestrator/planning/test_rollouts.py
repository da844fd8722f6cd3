"""What a step with rollouts takes, against the same reckoned by hand."""

from dataclasses import replace

import pytest

from actors.config.models import EngineConfig
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Role
from orchestrator.planning.cluster_fit import node_problems
from orchestrator.planning.memory import replica_memory, sampler_memory
from orchestrator.planning.plan import PlanOptions, make_plan, visited
from orchestrator.planning.rollouts import RolloutPace, rollout_pace, sampling_rate
from orchestrator.planning.shapes import ModelShape
from orchestrator.planning.throughput import Rates
from tests.orchestrator.config.test_run import changed

STUDENT = ModelShape(
    weights=500_000_000, trained=500_000_000, vocab_size=100_000, hidden_size=1000, intermediate_size=4000, layers=20,
    layer_weights=20_000_000, heads=10, kv_size=512, tied=True, trains_head=True,
)  # fmt: skip
TEACHER = replace(STUDENT, weights=16_000_000_000, layer_weights=800_000_000)
SHAPES: dict[Role, ModelShape] = {"student": STUDENT, "teacher": TEACHER}
RATES = Rates(scoring=4_000.0, training=2_000.0, source="said")


def config(rollouts: str, *overrides: str) -> RunConfig:
    scratch = "student.model={kind: scratch, hidden_size: 64, layers: 1, heads: 2}"
    return changed(scratch, f"rollouts={{{rollouts}}}", "train.batch_rows=32", "workers.count=4", *overrides)


def test_few_rows_wait_for_the_weights_to_be_read_and_many_for_the_operations() -> None:
    engine = EngineConfig(kind="vllm", gpu=True, dtype="bfloat16")
    large = TEACHER
    reading = 16e9 * 2 / (2.0e12 * 0.6)  # a GPU's memory, of which 60 % is used
    a_row = (2 * 20 * 800e6 + 20 * 4 * 1000 * 200 / 2 + 2 * 100e6) / (300e12 * 0.4)
    assert reading > 8 * a_row and reading < 200 * a_row
    assert sampling_rate(large, engine, 8, 200, 300e12) == pytest.approx(8 / reading)
    assert sampling_rate(large, engine, 200, 200, 300e12) == pytest.approx(1 / a_row)
    both = engine.model_copy(update={"tensor_parallel": 2})
    assert sampling_rate(large, both, 8, 200, 300e12) == pytest.approx(16 / reading)
    on_cpus = EngineConfig(kind="vllm", dtype="float32", cpus=2)
    assert sampling_rate(STUDENT, on_cpus, 1, 200, 300e12) == pytest.approx(2 * 10e9 * 0.6 / (500e6 * 4))


def test_a_small_model_waits_for_the_host() -> None:
    engine = EngineConfig(kind="vllm", gpu=True, dtype="bfloat16")
    assert sampling_rate(STUDENT, engine, 8, 200, 300e12) == pytest.approx(8 / 0.005)


@pytest.mark.parametrize(("share", "lag"), [(1.0, 0), (1.0, 1), (0.5, 1)])
def test_the_parts_of_a_step_by_hand(share: float, lag: int) -> None:
    engine = "engine: {kind: vllm, gpu: true, dtype: bfloat16, replicas: 2}"
    found = rollout_pace(
        config(f"student_share: {share}, lag: {lag}, max_new_tokens: 100, {engine}"), SHAPES, 60.0, RATES, 3, 300e12
    )
    written = 32 * share
    a_sampler = sampling_rate(STUDENT, EngineConfig(gpu=True, dtype="bfloat16"), written / 2, 100, 300e12)
    assert found.sampling_seconds == pytest.approx(written * 100 / (2 * a_sampler))
    assert found.scoring_seconds == pytest.approx(written * 160 / (3 * 4_000))
    assert found.training_seconds == pytest.approx((written * 160 + (32 - written) * 60) / (4 * 2_000))
    parts = [found.sampling_seconds, found.scoring_seconds, found.training_seconds]
    assert found.seconds == pytest.approx(max(parts) if lag else sum(parts))


def test_steps_on_the_same_rows_share_what_it_took_to_write_them() -> None:
    once, thrice = (
        rollout_pace(config(f"student_share: 1, max_new_tokens: 100, inner_epochs: {times}"), SHAPES, 60.0, RATES, 3, 300e12)
        for times in (1, 3)
    )
    assert thrice.sampling_seconds == pytest.approx(once.sampling_seconds / 3)
    assert thrice.scoring_seconds == pytest.approx(once.scoring_seconds / 3)
    assert thrice.training_seconds == once.training_seconds
    assert visited(config("inner_epochs: 3", "train.epochs=2")).epochs == 6
    assert visited(changed()) == changed().train


def test_tokens_that_the_teacher_draws_take_its_time() -> None:
    engines = "engine: {gpu: true, dtype: bfloat16}, teacher_engine: {gpu: true, dtype: bfloat16, replicas: 2}"
    found = rollout_pace(
        config(f"student_share: 1, teacher_share: 0.25, max_new_tokens: 100, {engines}"), SHAPES, 60.0, RATES, 3, 300e12
    )
    gpu = EngineConfig(gpu=True, dtype="bfloat16")
    student, teacher = (sampling_rate(shape, gpu, rows, 100, 300e12) for shape, rows in ((STUDENT, 32), (TEACHER, 16)))
    assert found.sampling_seconds == pytest.approx(3200 * (0.75 / student + 0.25 / (2 * teacher)))


def test_as_many_as_keep_up_are_named() -> None:
    slow = RolloutPace(2, 3, 4, 1, sampling_seconds=5.0, scoring_seconds=1.0, training_seconds=2.0)
    assert slow.slowest == "sampling" and slow.seconds == 5.0
    said = slow.lines()
    assert said[0].endswith("5 s in all (the slowest of them with its lag); sampling takes longest")
    assert said[1].startswith("rollouts: 5 samplers and 2 replicas keep up with 4 workers where the lag is 1")
    in_turn = replace(slow, lag=0, sampling_seconds=0.1)
    assert in_turn.seconds == pytest.approx(3.1) and in_turn.slowest == "training"
    assert "(one after the other without a lag)" in in_turn.lines()[0] and "1 sampler and 2 replicas" in in_turn.lines()[1]


def test_a_plan_says_it() -> None:
    made = make_plan(config("max_new_tokens: 20"), PlanOptions(rows=500, row_tokens=40, row_targets=20))
    assert [line.split(":")[0] for line in made.remarks] == ["rollouts", "rollouts"]


HERE = PlanOptions(rows=500, row_tokens=40, row_targets=20)
ON_GPUS = ("teacher.engine.gpu=true", "teacher.engine.kind=vllm", "workers.gpus=1")
SAMPLER = "max_new_tokens: 40, engine: {kind: vllm, gpu: true, dtype: bfloat16, labels: {role: writer}}"


def test_a_sampler_is_counted_like_a_replica_but_for_its_logits() -> None:
    for kind, rows in (("vllm", 64), ("transformers", 1)):
        engine = EngineConfig(kind=kind, dtype="bfloat16", rows_per_call=64)
        found, replica = sampler_memory(STUDENT, engine, 500), replica_memory(STUDENT, engine, 500, 0)
        assert found.parts["logits"] == rows * 100_000 * (2 + 4 + 4)
        rest = {name: count for name, count in replica.parts.items() if name != "scoring"}
        assert {name: count for name, count in found.parts.items() if name != "logits"} == rest


def test_samplers_stand_in_the_plan_and_count_beside_teacher_and_workers() -> None:
    made = make_plan(config("max_new_tokens: 40, engine: {kind: transformers, cpus: 1, replicas: 2}", "workers.count=1"), HERE)
    assert list(made.memory)[:2] == ["scoring", "sampling"]
    place = replace(made.place, nodes=made.place.nodes[:1], node_bytes=1.0)
    lines = node_problems(config("engine: {kind: transformers, cpus: 1}"), place, made.estimator)
    assert any(line.startswith("scoring and sampling and train, at one time, takes ") for line in lines)


def test_a_sampler_that_no_gpu_holds_is_a_problem_in_words() -> None:
    """The labels of its nodes are nothing that numbers know."""
    asked = PlanOptions(gpus=8, gpu_memory=80.0, rows=1000, row_tokens=100.0, row_targets=50.0)
    assert make_plan(config(SAMPLER, *ON_GPUS), asked).fits
    small = replace(asked, gpu_memory=0.01)
    problems = make_plan(config(SAMPLER, *ON_GPUS), small).problems
    assert any(line.startswith("rollouts.engine: weights, activations, logits and the cache") for line in problems), problems
    plain = SAMPLER.replace("kind: vllm", "kind: transformers")
    problems = make_plan(config(plain, *ON_GPUS), small).problems
    assert any(line.startswith("rollouts.engine: a sampler takes ") for line in problems), problems
