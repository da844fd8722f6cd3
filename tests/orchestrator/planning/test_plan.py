"""The command ``plan``: verdicts against brute force, what is said where nothing fits, exit codes and JSON."""

import json
from itertools import product
from pathlib import Path

import pytest

from actors.format import GIB
from actors.placement import Node
from orchestrator.cli import main
from orchestrator.config.run import RunConfig
from orchestrator.planning import probe as plan_probe
from orchestrator.planning.cluster_fit import (
    TargetCluster,
    given_place,
    gpu_bytes_of,
    live_place,
    problems,
    settled_replicas,
)
from orchestrator.planning.jobs import Estimator, trainings
from orchestrator.planning.nearest import changed as with_overrides
from orchestrator.planning.nearest import nearest_plan
from orchestrator.planning.plan import Plan, PlanOptions, make_plan
from orchestrator.planning.report import data_lines, time_lines, verdict_lines
from orchestrator.planning.shapes import workload_of
from tests.logs import logged
from tests.orchestrator.config.test_run import changed

PAIR = (
    "tokenizer.vocab_size=32000",
    "teacher.model={kind: scratch, hidden_size: 2048, layers: 24, heads: 16}",
    "teacher.engine={gpu: true, replicas: 4, tensor_parallel: 2}",
    "teacher.finetune.train={precision: bfloat16, micro_batch_rows: 1, gradient_checkpointing: true, sharding: fsdp}",
    "teacher.finetune.workers={count: 4, gpus: 1}",
    "student.model={kind: scratch, hidden_size: 1024, layers: 12, heads: 16}",
    "train={precision: bfloat16, micro_batch_rows: 8}",
    "workers={count: 4, gpus: 1}",
)
ROWS = ("--rows", "20000", "--row-tokens", "300", "--row-targets", "150")


def pair(*overrides: str) -> RunConfig:
    return changed(*PAIR, *overrides)


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    config = pair()
    return Estimator(config, workload_of(config, 20_000, 300, 150))


def fits(config: RunConfig, place: TargetCluster, estimator: Estimator) -> bool:
    """Whether it fits, said again: count devices node by node, and compare each job's bytes with a GPU."""
    per_node = [int(node.total["GPU"]) for node in place.nodes]
    engine, workers = config.teacher.engine, config.workers
    replicas = 1 if engine.replicas == "auto" else engine.replicas
    held = {"replicas": engine.tensor_parallel}

    def placed(groups: int, wanted: int, singles: int) -> bool:
        """Whether groups of GPUs of one node each, and so many single GPUs, find room together."""
        left = sum(per_node) - groups * wanted
        return sum(gpus // wanted for gpus in per_node) >= groups and left >= singles

    beside = workers.count if config.scores.overlap else 0
    counted = placed(replicas, held["replicas"], beside) and sum(per_node) >= workers.count
    assert config.teacher.finetune
    counted = counted and sum(per_node) >= config.teacher.finetune.workers.count
    large = [gpu_bytes_of(estimator.training(job)) for job in trainings(config)]
    share = engine.gpu_memory_utilization
    shape = estimator.shapes["teacher"]
    scoring = 1024 * shape.vocab_size * (2 + 4 + 4) + GIB
    weights = 2 * shape.weights / engine.tensor_parallel
    roomy = weights < 0.95 * share * place.gpu_bytes and scoring <= (1 - share) * place.gpu_bytes
    return counted and roomy and max(large) <= place.gpu_bytes


@pytest.mark.parametrize("gpus", [1, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("gib", [6.0, 12.0, 40.0])
def test_the_verdict_is_that_of_counting(gpus: int, gib: float, estimator: Estimator) -> None:
    for per_node, overlap, replicas in product((4, 8), (True, False), (1, 4)):
        place = given_place(gpus, gib, per_node)
        config = pair(f"scores.overlap={str(overlap).lower()}", f"teacher.engine.replicas={replicas}")
        assert (not problems(config, place, estimator)) == fits(config, place, estimator)


@pytest.mark.parametrize(
    ("gpus", "gib"), [(64, 80.0), (8, 80.0), (4, 80.0), (2, 80.0), (1, 80.0), (8, 16.0), (8, 10.0), (3, 24.0)]
)
def test_the_nearest_plan_fits_and_changes_nothing_needless(gpus: int, gib: float, estimator: Estimator) -> None:
    place = given_place(gpus, gib, 8)
    found = nearest_plan(pair(), place, estimator)
    assert found.config is not None, found.otherwise
    assert problems(found.config, place, estimator) == []
    assert with_overrides(pair(), found.overrides) == found.config
    for left_out in found.overrides:
        others = [one for one in found.overrides if one != left_out]
        assert problems(with_overrides(pair(), others), place, estimator), f"{left_out} was not needed"


def test_what_fits_stays_as_it_is(estimator: Estimator) -> None:
    assert nearest_plan(pair(), given_place(12, 80, 8), estimator).overrides == ()


def test_memory_is_made_by_smaller_passes_first(estimator: Estimator) -> None:
    config = pair("train={precision: float32, micro_batch_rows: 32}", "workers.count=1", "teacher.engine.replicas=1")
    memory = estimator.training(trainings(config)[-1])
    place = given_place(8, gpu_bytes_of(memory) / GIB - 1, 8)
    assert nearest_plan(config, place, estimator).overrides == ("train.micro_batch_rows=16",)


def test_where_nothing_fits_the_least_is_said(estimator: Estimator) -> None:
    found = nearest_plan(pair(), given_place(8, 4, 8), estimator)
    assert (found.config, found.overrides) == (None, ())
    assert "no plan for this pair fits GPUs of 4 GiB: a" in found.otherwise and "GiB at the least" in found.otherwise


def test_where_devices_are_too_few_for_anything_it_is_said(estimator: Estimator) -> None:
    config = pair("teacher.engine.labels={role: teacher}")
    found = nearest_plan(config, TargetCluster(given_place(8, 80, 8).nodes, 80 * GIB, float("inf"), live=True), estimator)
    assert "no plan for this pair was found for 1 node with 8 GPUs of 80 GiB; more GPUs" in found.otherwise


def test_auto_takes_what_is_left_and_no_more_than_shards() -> None:
    config = pair("teacher.engine.replicas=auto")
    assert settled_replicas(config, given_place(16, 80, 8), shards=100) == 6
    assert settled_replicas(config, given_place(16, 80, 8), shards=3) == 3
    assert (
        settled_replicas(changed(*PAIR, "teacher.engine.replicas=auto", "scores.overlap=false"), given_place(16, 80, 8), 100) == 8
    )


def test_each_lack_is_named(estimator: Estimator) -> None:
    assert (
        "teacher.engine: scoring takes 1.3 GiB of each GPU beside vLLM's share, and gpu_memory_utilization 0.95 leaves it 1.2"
        in (problems(pair("teacher.engine.gpu_memory_utilization=0.95"), given_place(12, 24, 8), estimator))
    )
    lines = problems(pair("teacher.engine.gpu_memory_utilization=0.3"), given_place(12, 2, 8), estimator)
    assert any("weights, activations and the cache of one row take" in line for line in lines)
    assert any(line.startswith("train: each worker takes") and "each has 2, at the" in line for line in lines)
    plain = pair("teacher.engine={gpu: true, kind: transformers, tensor_parallel: 1, replicas: 1}")
    assert any("teacher.engine: a replica takes" in line for line in problems(plain, given_place(12, 2, 8), estimator))


def test_a_node_without_gpus_must_hold_replicas_and_workers_together() -> None:
    config = changed("data.source={kind: builtin, rows: 300}", "teacher.engine.kv_cache_mib=1000")
    estimator = Estimator(config, workload_of(config, 500, 30, 15))

    def lines(gib: float, overlap: bool) -> list[str]:
        place = TargetCluster([Node("here", {"CPU": 8.0})], 0.0, gib * GIB, live=True)
        return problems(
            config.model_copy(update={"scores": config.scores.model_copy(update={"overlap": overlap})}), place, estimator
        )

    assert lines(4, overlap=True) == [] == lines(2, overlap=False)
    assert lines(2, overlap=True) == [
        line for line in lines(2, overlap=True) if line.startswith("scoring and train, at one time, takes")
    ]
    assert [line.split(" takes")[0] for line in lines(1, overlap=False)] == ["scoring"]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 80, 8), "--gpus 0 is no cluster; 1 is the least"),
        ((8, 0, 8), "--gpu-memory 0 GiB holds nothing; 80 would do"),
        ((8, 80, 0), "--gpus-per-node 0 is no node; 8 would do"),
    ],
)
def test_numbers_that_are_no_cluster_are_refused(numbers: tuple[int, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_place(*numbers)


def test_a_cluster_of_numbers_has_a_smaller_last_node() -> None:
    place = given_place(19, 40, 8)
    assert [node.total["GPU"] for node in place.nodes] == [8, 8, 3]
    assert (place.gpus, str(place)) == (19, "19 GPUs of 40 GiB on 3 nodes")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (PlanOptions(gpus=8), "--gpus 8 needs --gpu-memory, the GiB of each; 80 for an A100 or H100"),
        (
            PlanOptions(gpus=8, gpu_memory=80, probe=True),
            "--probe measures the machines that are there, and --gpus speaks of others",
        ),
        (PlanOptions(gpu_tflops=0), "--gpu-tflops 0 computes nothing; 312 is an A100's in 16 bits"),
        (PlanOptions(rows=5), "--rows, --row-tokens and --row-targets go together"),
    ],
)
def test_options_that_contradict_each_other_are_refused(asked: PlanOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(pair(), asked)


def made(config: RunConfig, **asked: object) -> Plan:
    return make_plan(config, PlanOptions(rows=20_000, row_tokens=300, row_targets=150, **asked))  # type: ignore[arg-type]


def test_labels_are_not_asked_of_a_cluster_of_numbers() -> None:
    config = pair("teacher.engine.labels={role: teacher}", "workers.resources={student_node: 1}")
    assert made(config, gpus=12, gpu_memory=80.0).fits


def test_gpus_that_stay_idle_are_spoken_of() -> None:
    idle = made(pair("workers.gpus=0"), gpus=12, gpu_memory=80.0)
    assert idle.remarks == ("the student takes no GPU in this configuration; workers.gpus=1 would give it one",)
    assert made(pair(), gpus=12, gpu_memory=80.0).remarks == ()
    written = made(pair("responses={writer: student, samples_per_prompt: 2, max_new_tokens: 90}"), gpus=12, gpu_memory=80.0)
    assert written.remarks == (
        "respond: the student writes 40,000 responses of at most 90 tokens before anything is scored; how long that takes is in "
        "none of the hours",
    )


def test_benchmarks_and_a_judge_are_in_none_of_the_hours() -> None:
    measured = made(pair("evaluate.benchmarks={tasks: [gsm8k, mmlu]}", "evaluate.judge={model: wise}"), gpus=12, gpu_memory=80.0)
    assert measured.remarks == (
        "evaluate.benchmarks: 2 tasks, 3 models; how long that takes is in none of the hours",
        "evaluate.judge: wise is asked about the models' answers; how long that takes, and what it costs, is in none of the "
        "hours",
    )


def test_an_evaluator_that_one_gpu_does_not_hold_is_a_problem_with_a_way_out() -> None:
    plan = made(pair("evaluate={gpus: 1, batch_rows: 64}"), gpus=12, gpu_memory=10.0)
    assert list(plan.problems) == [
        "evaluate: the evaluator with the teacher takes 10.8 GiB of a GPU, and each has 10; evaluate.teacher=scores takes its "
        "measures from the store"
    ]
    assert plan.nearest and plan.nearest.overrides == ("evaluate.precision=bfloat16",)
    assert made(pair("evaluate={gpus: 1, batch_rows: 64, teacher: scores}"), gpus=12, gpu_memory=10.0).fits


def test_where_workers_may_be_more_the_plan_is_for_the_fewest() -> None:
    elastic = made(pair("workers={min: 2, max: 8, gpus: 1, cpus: 4}", "train.sharding=fsdp"), gpus=12, gpu_memory=80.0)
    steady = made(pair("workers={count: 2, gpus: 1, cpus: 4}", "train.sharding=fsdp"), gpus=12, gpu_memory=80.0)
    assert elastic.remarks == (
        "train: planned with 2 workers, its min; up to 8 train where there is room. What is said of count holds for min",
    )
    assert (elastic.memory, elastic.pace, elastic.nearest) == (steady.memory, steady.pace, steady.nearest)


def test_hours_are_arithmetic_over_the_rates() -> None:
    plan = made(pair("train.epochs=3", "tune.trials=5"), gpus=12, gpu_memory=80.0)
    tokens = 20_000 * 300
    assert plan.pace.epoch_seconds == pytest.approx(tokens / (4 * plan.rates.training), rel=0.01)
    assert plan.pace.scoring_seconds == pytest.approx((tokens + 200 * 300) / (4 * plan.rates.scoring), rel=0.03)
    assert plan.seconds == sum(plan.finetune_seconds.values()) + plan.pace.seconds
    trials = plan.search_seconds - sum(plan.finetune_seconds.values()) - plan.pace.scoring_seconds
    assert trials == pytest.approx(5 * 3 * plan.pace.epoch_seconds)
    weights = plan.estimator.shapes["teacher"].weights
    head = 32_000 * 2048
    attention = 24 * 2 * 2048 * 300
    a_token = 2 * (weights - head) + 2 * head * 0.5 + attention
    assert plan.rates.scoring == pytest.approx(0.4 * 2 * 312e12 / a_token, rel=0.01)


def test_lines_say_what_was_found() -> None:
    plan = made(pair(), gpus=8, gpu_memory=80.0)
    assert verdict_lines(plan)[0] == "verdict: does not fit 8 GPUs of 80 GiB on 1 node"
    assert verdict_lines(plan)[-1].startswith("nearest plan that fits: teacher.engine.replicas=2 (")
    assert "20,000 rows, 6,000,000 tokens, 3,000,000 targets" in data_lines(plan)[0]
    assert any(line.startswith("bottleneck of the first epoch: the ") for line in time_lines(plan))


def test_this_machine_is_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="this machine cannot see how large they are; --gpu-memory 80 would say it"):
        live_place(None)
    assert (live_place(40).gpus, live_place(40).gpu_bytes) == (2, 40 * GIB)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert (live_place(None).gpus, str(live_place(None))) == (0, "1 node with no GPU")
    assert live_place(None, cpus=1000).nodes[0].total["CPU"] == 1000, "its own Ray is told so many"


def test_the_command_ends_with_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "configs/tiny_cpu.yaml", f"output={tmp_path}", "data.source.rows=700"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "store:" in shown and "verdict: fits 1 node" in shown and "400 rows" in shown
    on_gpus = [*command, "teacher.engine={gpu: true, replicas: 9}", "--gpus", "8", "--gpu-memory", "80"]
    assert main([*on_gpus, "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["nearest"]["overrides"] == ["teacher.engine.replicas=8"] and not plan["fits"]
    assert plan["data"]["rows"] == 400 and plan["models"]["student"]["weights"] == 211_392
    assert plan["memory_bytes"]["train"]["total"] == sum(plan["memory_bytes"]["train"]["parts"].values())
    assert len(plan["sweep"]) == 11 * 9 and max(one["workers"] for one in plan["sweep"]) == 1024
    assert main([*command, "--gpus", "8"]) == 2
    assert "--gpus 8 needs --gpu-memory" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
def test_a_probe_measures_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    monkeypatch.setattr(plan_probe, "SCORING_SECONDS", 0.1)
    monkeypatch.setattr(plan_probe, "TRAINING_SECONDS", 0.1)
    config = changed(
        f"output={tmp_path}", "teacher.engine={kind: transformers, dtype: float32}", "scores.top_k=8", "train.batch_rows=8",
        "loss={kind: atkd, scope: dataset}", "scores.overlap=false",
    )  # fmt: skip
    with logged() as lines:
        plan = make_plan(config, PlanOptions(rows=300, row_tokens=20, row_targets=9, probe=True))
    assert plan.rates.scoring > 0 and plan.rates.training > 0 and plan.rates.source.startswith("measured now")
    assert plan.assumptions == () and len([line for line in lines if line.startswith("probe: ")]) == 3
    assert list(tmp_path.iterdir()) == [], "what was made for it is gone"


@pytest.mark.ray
def test_the_cluster_that_ray_address_names_is_read(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    place = live_place(None)
    assert [node.total["CPU"] for node in place.nodes] == [4] and place.gpus == 0
    assert place.node_bytes == place.nodes[0].total["memory"]
