"""Each thing that a node can lack is said in one line, with the key and what would do; the facts are made up."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster import node_checks
from orchestrator.cluster.node_checks import (
    LEAST_DRIVER,
    as_ray_may_hide,
    asks_for_gpus,
    describe,
    differing_nodes,
    node_faults,
    older,
    require_gpu_nodes,
    require_node,
)
from orchestrator.cluster.node_facts import NodeFacts, installed_vllm
from orchestrator.cluster.ray_session import require_machine
from orchestrator.config.load import load_config
from orchestrator.config.run import RunConfig
from orchestrator.doctor.run_checks import check_devices
from tests.test_gpu_lock import GPU

ROOT = Path(__file__).parents[3]
SOUND = NodeFacts(
    node="this machine", torch="2.13.0", torch_cuda="13.0", nccl="2.29.7", driver="580.95.05", gpus=8, usable_gpus=8,
    visible=None, vllm="gpu", c_compiler="/usr/bin/gcc", cxx_compiler="/usr/bin/g++", python_headers=True,
)  # fmt: skip
"""A machine of eight GPUs with all that a run needs."""
CPU_ONLY = replace(
    SOUND, torch="2.13.0+cpu", torch_cuda=None, nccl=None, driver=None, gpus=0, usable_gpus=0, vllm="cpu"
)


def on_gpus(*overrides: str) -> RunConfig:
    return load_config("configs/qwen_7b_to_0.5b_one_node.yaml", list(overrides))


def on_cpus(*overrides: str) -> RunConfig:
    return load_config("configs/tiny_cpu.yaml", list(overrides))


def but(**changes: Any) -> NodeFacts:
    """The sound machine, of which something is otherwise; torch uses its GPUs only where nothing is said of them."""
    return replace(SOUND, **changes)


def test_sound_machines_have_no_faults() -> None:
    assert node_faults(on_gpus("train.compile=true"), SOUND) == []
    assert node_faults(on_cpus("train.compile=true"), CPU_ONLY) == []
    assert node_faults(on_cpus("train.compile=true"), replace(CPU_ONLY, c_compiler=None, python_headers=False)) == []
    assert node_faults(on_cpus(), replace(CPU_ONLY, cxx_compiler=None)) == []


def test_the_keys_that_ask_for_gpus_are_named() -> None:
    assert asks_for_gpus(on_cpus()) == []
    assert asks_for_gpus(on_gpus()) == ["teacher.engine.gpu", "workers.gpus", "evaluate.gpus"]
    assert asks_for_gpus(on_cpus("responses={writer: student, engine: {gpu: true}}")) == ["responses.engine.gpu"]
    fitted = on_cpus("teacher.finetune.workers.gpus=1", "student.finetune.workers.gpus=1")
    assert asks_for_gpus(fitted) == ["teacher.finetune.workers.gpus", "student.finetune.workers.gpus"]


KEYS = r"^teacher\.engine\.gpu, workers\.gpus, evaluate\.gpus: this machine has a GPU, and torch 2\.13\.0"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            but(driver="550.54.15", usable_gpus=0),
            KEYS + r" is built for CUDA 13\.0, which needs driver 580\.65\.06 or later, and 550\.54\.15 is installed; a newer "
            r"driver would do, or on data-centre GPUs NVIDIA's package cuda-compat for CUDA 13\.0$",
        ),
        (
            but(torch="2.13.0+cpu", torch_cuda=None, usable_gpus=0),
            KEYS + r"\+cpu is a build for CPUs; the packages of requirements/gpu\.lock would do$",
        ),
        (but(visible="", usable_gpus=0), KEYS + r" sees none, since CUDA_VISIBLE_DEVICES is ''; unset it$"),
        (but(usable_gpus=0), KEYS + r" \(CUDA 13\.0\) cannot use it with driver 580\.95\.05; nvidia-smi says more, .*--gpus all"),
        (
            but(vllm="cpu"),
            r"^teacher\.engine\.gpu is true, and the vLLM that is installed is built for CPUs: .*kind=transformers, would do$",
        ),
        (
            but(vllm=None),
            r"^teacher\.engine\.kind is vllm, and on this machine none is installed: .*kind=transformers would do without$",
        ),
        (
            but(c_compiler=None),
            r"^teacher\.engine\.gpu with kind vllm compiles with Triton, and this machine has no C compiler; gcc, or its path in "
            r"CC, would do$",
        ),
        (but(python_headers=False), r"^teacher\.engine\.gpu with kind vllm .* has no Python\.h; python3\.11-dev \(or -devel\)"),
    ],
)
def test_what_a_machine_with_gpus_lacks_is_one_line(facts: NodeFacts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_node(on_gpus(), facts)
    (fault,) = node_faults(on_gpus(), facts)
    assert "\n" not in fault


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (replace(CPU_ONLY, vllm=None), r"^responses\.engine\.kind is vllm, .*; responses\.engine\.kind=transformers would do"),
        (replace(CPU_ONLY, vllm="gpu"), r"^responses\.engine\.gpu is false, .*: responses\.engine\.gpu=true, responses\.engine"),
    ],
)
def test_the_engine_of_who_writes_responses_is_looked_at_too(facts: NodeFacts, message: str) -> None:
    config = on_cpus("teacher.engine.kind=transformers", "responses={writer: student, engine: {kind: vllm}}")
    with pytest.raises(ValueError, match=message):
        require_node(config, facts)


def test_a_driver_that_a_compatibility_package_makes_do_is_not_refused() -> None:
    assert node_faults(on_gpus(), but(driver="550.54.15")) == []


def test_the_build_for_gpus_is_refused_where_the_teacher_is_to_run_on_cpus() -> None:
    (fault,) = node_faults(on_cpus(), but())
    assert fault.startswith("teacher.engine.gpu is false, and the vLLM that is installed is built for GPUs")
    assert node_faults(on_cpus("teacher.engine.kind=transformers"), but()) == []


@pytest.mark.parametrize(
    ("config", "facts", "message"),
    [
        (on_gpus("teacher.engine={kind: transformers, tensor_parallel: 1}", "train.compile=true"), but(c_compiler=None),
         "train.compile compiles with Triton, and this machine has no C compiler; gcc, or its path in CC, would do"),
        (on_cpus("train.compile=true"), replace(CPU_ONLY, cxx_compiler=None),
         "train.compile compiles for the CPU, and this machine has no C++ compiler; g++, or train.compile=false, would do"),
        (on_cpus("teacher.finetune.train.compile=true"), replace(CPU_ONLY, cxx_compiler=None),
         "teacher.finetune.train.compile compiles for the CPU, and this machine has no C++ compiler; g++, or "
         "teacher.finetune.train.compile=false, would do"),
    ],
)  # fmt: skip
def test_what_is_compiled_needs_a_compiler(config: RunConfig, facts: NodeFacts, message: str) -> None:
    assert node_faults(config, facts) == [message]


def test_nodes_of_one_training_have_one_nccl() -> None:
    other = but(node="10.0.0.2", nccl="2.28.9", torch="2.12.1")
    assert differing_nodes([SOUND, replace(SOUND, node="10.0.0.3")]) is None
    assert differing_nodes([SOUND, other]) == (
        "this machine has NCCL 2.29.7 (torch 2.13.0), 10.0.0.2 has 2.28.9 (torch 2.12.1); the same packages on all nodes would do"
    )


def test_each_node_with_gpus_of_a_cluster_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    old = but(node="10.0.0.2", driver="550.54.15", usable_gpus=0)
    monkeypatch.setattr(node_checks, "facts_of_gpu_nodes", lambda: [SOUND, old])
    with pytest.raises(ValueError, match=r"10\.0\.0\.2 has a GPU, and torch .* 550\.54\.15 is installed"):
        require_gpu_nodes(on_gpus())
    require_gpu_nodes(on_cpus())
    monkeypatch.setattr(node_checks, "facts_of_gpu_nodes", lambda: [SOUND, replace(SOUND, node="10.0.0.3", nccl="2.28.9")])
    with pytest.raises(ValueError, match=r"10\.0\.0\.3 has 2\.28\.9"):
        require_gpu_nodes(on_gpus())


def test_what_ray_hides_from_a_task_is_no_fault() -> None:
    hidden = but(visible="", usable_gpus=0)
    assert node_faults(on_gpus(), as_ray_may_hide(hidden)) == []
    old = but(driver="550.54.15", usable_gpus=0)
    assert as_ray_may_hide(old) == old


def test_versions_of_drivers_are_compared_number_by_number() -> None:
    assert older("550.54.15", "580.65.06") and older("580.65.05", "580.65.06") and not older("1000.1", "580.65.06")
    assert not older("580.65.06", "580.65.06")


def test_the_table_knows_the_cuda_of_the_lock() -> None:
    assert LEAST_DRIVER[int(GPU["nvidia-cuda-runtime"].split(".")[0])].startswith("580.")


# ---- the same at the start of a run, and by the doctor


def test_where_there_is_no_gpu_at_all_that_is_what_is_said() -> None:
    for facts in (CPU_ONLY, replace(SOUND, driver=None, gpus=0, usable_gpus=0)):
        with pytest.raises(ValueError, match=r"^teacher\.engine: each replica wants 2 GPUs, and no node has a GPU; .*gpu false"):
            require_machine(on_gpus(), facts)


def test_too_few_gpus_are_told_from_gpus_that_cannot_be_used() -> None:
    require_machine(on_gpus(), SOUND)
    with pytest.raises(ValueError, match=r"2 replicas of 2 GPUs .* and 4 workers .* do not fit at one time"):
        require_machine(on_gpus(), but(gpus=4, usable_gpus=4))
    with pytest.raises(ValueError, match=r"needs driver 580\.65\.06"):
        require_machine(on_gpus(), but(driver="550.54.15", usable_gpus=0))


def test_a_cluster_is_not_judged_by_the_machine_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    require_machine(on_gpus(), CPU_ONLY)
    assert "each node with GPUs of the cluster" in check_devices(on_gpus(), CPU_ONLY).line()


def test_the_doctor_says_it_in_one_line() -> None:
    assert check_devices(on_gpus(), SOUND).line() == (
        "ok devices: this machine has 8 GPUs, driver 580.95.05, torch 2.13.0 (CUDA 13.0, NCCL 2.29.7), vLLM for GPUs, gcc and g++"
    )
    assert check_devices(on_cpus(), CPU_ONLY).line() == (
        "ok devices: this machine has 0 GPUs, torch 2.13.0+cpu (for CPUs), vLLM for CPUs, gcc and g++"
    )
    failed = check_devices(on_gpus(), but(c_compiler=None, cxx_compiler=None)).line()
    assert failed.startswith("FAILED devices: this machine has 8 GPUs") and "no compiler; teacher.engine.gpu with kind" in failed
    assert "vLLM not installed" in describe(but(vllm=None))


@pytest.mark.ray
def test_a_node_of_a_real_ray_is_asked_by_a_task() -> None:
    """Its GPUs are numbers; in a process of its own, since a process knows one Ray at a time."""
    code = """
import ray
from orchestrator.cluster.node_checks import as_ray_may_hide, facts_of_gpu_nodes, require_gpu_nodes
from orchestrator.cluster.node_facts import read_node_facts
from tests.orchestrator.cluster.test_node_checks import on_cpus, on_gpus
ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR")
(found,) = facts_of_gpu_nodes()
assert found == as_ray_may_hide(read_node_facts(ray.nodes()[0]["NodeManagerAddress"])), found
require_gpu_nodes(on_cpus())
try:
    require_gpu_nodes(on_gpus())
    print("nothing is missing")
except ValueError as error:
    print(error)
"""
    # Libraries that another test has loaded may have hidden all devices in this process.
    shown = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=shown, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {"cpu": "built for CPUs", None: "none is installed", "gpu": ""}[installed_vllm()]
    assert expected in done.stdout
