"""Prove that the CPU environment is sound: what must import does, and what would break it is not there."""

import importlib.util

for package in ("torchvision", "torchaudio", "torchcodec"):
    if importlib.util.find_spec(package):
        raise SystemExit(f"{package} is in this environment and breaks vLLM beside a CPU torch: .venv/bin/python -m pip uninstall {package}")

import ray  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import vllm  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402, F401  # model classes are imported lazily: this one proves them

print(f"setup: torch {torch.__version__}, transformers {transformers.__version__}, vllm {vllm.__version__}, ray {ray.__version__}")
