"""What vLLM does not serve, by rules alone."""

import pytest

from actors.engines.vllm_limits import require_build_for, require_cpu_head_size


def test_the_installed_build_must_be_one_for_the_device() -> None:
    require_build_for(gpu=True, device_type="cuda")
    require_build_for(gpu=False, device_type="cpu")
    with pytest.raises(ValueError, match=r"^teacher\.engine\.gpu is true, .* built for CPUs: .*kind=transformers, would do$"):
        require_build_for(gpu=True, device_type="cpu")
    for device_type in ("cuda", ""):  # the second: a build for GPUs that sees none
        with pytest.raises(ValueError, match=r"^teacher\.engine\.gpu is false, .* built for GPUs .* teacher\.engine\.gpu=true"):
            require_build_for(gpu=False, device_type=device_type)


def test_heads_that_cpus_have_kernels_for() -> None:
    require_cpu_head_size(hidden_size=128, heads=2)
    with pytest.raises(ValueError, match=r"heads of size 20 .* hidden_size 96 would do"):
        require_cpu_head_size(hidden_size=60, heads=3)
