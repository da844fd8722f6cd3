"""The engines that sample, by the names that a user may type."""

from actors.rollouts.base import Sampler, SamplerSpec


def build_sampler(spec: SamplerSpec) -> Sampler:
    """Load the model into the engine that its config names."""
    if spec.engine.kind == "vllm":
        from actors.rollouts.vllm_sampler import VllmSampler  # here, so that only those who sample with vLLM need it installed

        return VllmSampler(spec)
    from actors.rollouts.transformers_sampler import TransformersSampler

    return TransformersSampler(spec)
