"""What vLLM is told of every model that it serves here. Imports neither torch nor vLLM."""

from typing import Any

from actors.config.models import EngineConfig
from actors.model_source import ModelSource


def engine_arguments(engine: EngineConfig, model: ModelSource) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` that scoring and sampling share: the model, its type, its device."""
    on_device: dict[str, Any] = (
        {"tensor_parallel_size": engine.tensor_parallel, "gpu_memory_utilization": engine.gpu_memory_utilization}
        if engine.gpu
        else {"kv_cache_memory_bytes": engine.kv_cache_mib << 20, "enforce_eager": True}
    )
    if engine.tensor_parallel > 1:
        on_device["distributed_executor_backend"] = "mp"  # the actor holds all devices of one node itself
    return {
        "model": model.name,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": engine.dtype,
        "load_format": "safetensors",  # other weights are pickles, which can run code
        "max_num_seqs": engine.rows_per_call,
        "logprobs_mode": "raw_logprobs",
        "skip_tokenizer_init": True,
        "seed": 0,
        **on_device,
    }
