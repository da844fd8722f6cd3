"""Whether a node's driver, compilers and packages are those that a run needs: facts in, words out; Ray is asked by the last two.

Each fault is one line with the key, what was found, and what would do.
"""

from collections.abc import Sequence
from dataclasses import replace

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.config.models import TrainConfig
from actors.config.workers import WorkersConfig
from actors.engines.vllm_limits import require_build_for
from actors.format import plural
from orchestrator.cluster.node_facts import NodeFacts, read_node_facts
from orchestrator.config.run import RunConfig

LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""For each major version of CUDA the oldest driver for Linux that runs it, newer minor versions included."""
HIDES_ALL = ("", "-1")
"""Values of ``CUDA_VISIBLE_DEVICES`` that leave no GPU."""
ANSWER_SECONDS = 120.0


def asks_for_gpus(config: RunConfig) -> list[str]:
    """Return the keys that ask for GPUs."""
    asking = [f"{section}.gpus" for section, workers, _ in trainings(config) if workers.gpus]
    serving = [f"{section}.gpu" for section, engine in config.engines.items() if engine.gpu]
    return serving + asking + (["evaluate.gpus"] if config.evaluate.gpus else [])


def trainings(config: RunConfig) -> list[tuple[str, WorkersConfig, TrainConfig]]:
    """Return section, workers and settings of each training of a run."""
    found = [("workers", config.workers, config.train)]
    for role, side in (("teacher", config.teacher), ("student", config.student)):
        if side.finetune is not None:
            found.append((f"{role}.finetune.workers", side.finetune.workers, side.finetune.train))
    return found


def node_faults(config: RunConfig, facts: NodeFacts) -> list[str]:
    """Return what keeps a run from a node; nothing where all is well, or where only the number of GPUs is too small."""
    found = [gpu_fault(config, facts), vllm_fault(config, facts), compiler_fault(config, facts)]
    return [fault for fault in found if fault is not None]


def gpu_fault(config: RunConfig, facts: NodeFacts) -> str | None:
    """Return why torch cannot use the GPUs that are there; None where it can, or where nobody asks for one."""
    asking = asks_for_gpus(config)
    if not asking or facts.usable_gpus or (facts.driver is None and not facts.gpus):
        return None
    asks = f"{', '.join(asking)}: {facts.node} has a GPU, and torch {facts.torch}"
    if facts.torch_cuda is None:
        return f"{asks} is a build for CPUs; the packages of requirements/gpu.lock would do"
    if facts.visible is not None and facts.visible.strip() in HIDES_ALL:
        return f"{asks} sees none, since CUDA_VISIBLE_DEVICES is {facts.visible!r}; unset it"
    least = least_driver(facts.torch_cuda)
    if facts.driver is not None and least is not None and older(facts.driver, least):
        return (
            f"{asks} is built for CUDA {facts.torch_cuda}, which needs driver {least} or later, and {facts.driver} is installed; "
            f"a newer driver would do, or on data-centre GPUs NVIDIA's package cuda-compat for CUDA {facts.torch_cuda}"
        )
    return (
        f"{asks} (CUDA {facts.torch_cuda}) cannot use it with driver {facts.driver or 'unknown'}; nvidia-smi says more, and a "
        "container needs --gpus all, or the runtime nvidia"
    )


def vllm_fault(config: RunConfig, facts: NodeFacts) -> str | None:
    """Return why the installed vLLM does not serve a model as the configuration says; None where it does."""
    for section, engine in config.engines.items():
        if engine.kind != "vllm":
            continue
        if facts.vllm is None:
            return (
                f"{section}.kind is vllm, and on {facts.node} none is installed: requirements/gpu.lock, or cpu.lock, has it; "
                f"{section}.kind=transformers would do without"
            )
        try:
            require_build_for(engine.gpu, "cpu" if facts.vllm == "cpu" else "cuda", section)
        except ValueError as error:
            return str(error)
    return None


def compiler_fault(config: RunConfig, facts: NodeFacts) -> str | None:
    """Return who needs a compiler that is not there; None where nobody does, or it is."""
    compiled = [(section, bool(workers.gpus)) for section, workers, train in trainings(config) if train.compile]
    on_gpus = [f"{section.removesuffix('workers')}train.compile" for section, gpu in compiled if gpu]
    on_gpus[:0] = [
        f"{section}.gpu with kind vllm" for section, engine in config.engines.items() if engine.kind == "vllm" and engine.gpu
    ]
    if on_gpus and facts.c_compiler is None:
        return f"{on_gpus[0]} compiles with Triton, and {facts.node} has no C compiler; gcc, or its path in CC, would do"
    if on_gpus and not facts.python_headers:
        return f"{on_gpus[0]} compiles with Triton, and {facts.node} has no Python.h; python3.11-dev (or -devel) would do"
    on_cpus = [f"{section.removesuffix('workers')}train.compile" for section, gpu in compiled if not gpu]
    if on_cpus and facts.cxx_compiler is None:
        return f"{on_cpus[0]} compiles for the CPU, and {facts.node} has no C++ compiler; g++, or {on_cpus[0]}=false, would do"
    return None


def differing_nodes(facts: Sequence[NodeFacts]) -> str | None:
    """Return which nodes have another NCCL than the first, by which the workers of one training could not speak to each other."""
    for other in facts[1:]:
        if other.nccl != facts[0].nccl:
            return (
                f"{facts[0].node} has NCCL {facts[0].nccl} (torch {facts[0].torch}), {other.node} has {other.nccl} (torch "
                f"{other.torch}); the same packages on all nodes would do"
            )
    return None


def least_driver(cuda: str) -> str | None:
    """Return the oldest driver that runs a version of CUDA; None where it is not known."""
    return LEAST_DRIVER.get(int(cuda.split(".")[0]))


def older(version: str, least: str) -> bool:
    """Whether a version of a driver is below another."""
    return [int(part) for part in version.split(".")] < [int(part) for part in least.split(".")]


def describe(facts: NodeFacts) -> str:
    """Return a node in a few words."""
    builds = {"cpu": "for CPUs", "gpu": "for GPUs", None: "not installed"}
    driver = f"driver {facts.driver}, " if facts.driver else ""
    cuda = f"CUDA {facts.torch_cuda}, NCCL {facts.nccl}" if facts.torch_cuda else "for CPUs"
    compilers = [one.rsplit("/", 1)[-1] for one in (facts.c_compiler, facts.cxx_compiler) if one]
    return (
        f"{facts.node} has {plural(facts.usable_gpus, 'GPU')}, {driver}torch {facts.torch} ({cuda}), vLLM {builds[facts.vllm]}, "
        f"{' and '.join(compilers) or 'no compiler'}"
    )


def require_node(config: RunConfig, facts: NodeFacts) -> None:
    """Raise if a node is not as a run needs it.

    Raises:
        ValueError: a line for each fault, naming the key, what was found and what would do.
    """
    if faults := node_faults(config, facts):
        raise ValueError("; ".join(faults))


def require_gpu_nodes(config: RunConfig) -> None:
    """Raise if a node with GPUs of the connected cluster is not as a run on GPUs needs it, or if two of them differ.

    Raises:
        ValueError: naming the node, what was found and what would do.
    """
    if not asks_for_gpus(config):
        return
    facts = facts_of_gpu_nodes()
    for one in facts:
        require_node(config, one)
    if differs := differing_nodes(facts):
        raise ValueError(differs)


def facts_of_gpu_nodes() -> list[NodeFacts]:
    """Ask each node of the connected cluster that has GPUs."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    answers = [
        ray.remote(read_node_facts)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(node["NodeManagerAddress"])
        for node in nodes
    ]
    return [as_ray_may_hide(one) for one in ray.get(answers, timeout=ANSWER_SECONDS)]


def as_ray_may_hide(facts: NodeFacts) -> NodeFacts:
    """Return what a task that asked for no GPU found; whether torch can use them stays open where Ray has hidden them."""
    hidden = facts.visible is not None and facts.visible.strip() in HIDES_ALL
    return replace(facts, visible=None, usable_gpus=facts.gpus) if hidden else facts
