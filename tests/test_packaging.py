"""What is promised to installers: the lock holds what the project asks for, whole and sound, and versions agree."""

import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import orchestrator
from orchestrator.__main__ import main

ROOT = Path(__file__).parents[1]
ROOMS = ("orchestrator", "actors", "losses", "tune_spaces")
ABSENT = ("torchvision", "torchaudio", "torchcodec")
LEFT_OUT = ("scikit-learn", "pytablewriter")
"""What the harness asks for and nothing here calls."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK_LINES = [line for line in (ROOT / "requirements/cpu.lock").read_text().splitlines() if not line.startswith("#")]

cpu_environment = pytest.mark.skipif(
    not metadata.version("torch").endswith("+cpu"), reason="speaks of the environment that `make setup` makes"
)


def locked_versions() -> dict[str, str]:
    """Return the pinned version of each package; torch's stands in the Makefile."""
    pins = [*LOCK_LINES, *re.findall(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)]
    return {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}


def active(requirements: list[str], extras: set[str]) -> Iterator[Requirement]:
    """Yield the requirements that hold on this machine with the given extras."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield requirement


def faults(requirements: list[str], locked: dict[str, str]) -> list[str]:
    """Follow requirements through the metadata of what is installed; return a line for each that the lock does not meet."""
    found, seen = [], set()
    waiting = list(active(requirements, set()))
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in (*ABSENT, *LEFT_OUT) or str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if name not in locked:
            found.append(f"{requirement}: not in the lock")
        elif not requirement.specifier.contains(locked[name], prereleases=True):
            found.append(f"{requirement}: the lock has {locked[name]}")
        else:
            waiting += active(metadata.distribution(name).requires or [], requirement.extras)
    return found


def test_a_missing_and_a_wrong_pin_are_seen() -> None:
    assert faults(["numpy>=2"], {}) == ["numpy>=2: not in the lock"]
    assert faults(["numpy>=2"], {"numpy": "1.26.0"}) == ["numpy>=2: the lock has 1.26.0"]


def test_the_lock_is_fully_pinned_and_names_no_place() -> None:
    assert [line for line in LOCK_LINES if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+", line)] == []
    names = [canonicalize_name(line.split("==")[0]) for line in LOCK_LINES]
    assert names == sorted(set(names))


@cpu_environment
def test_the_lock_holds_all_that_the_project_asks_for_and_all_that_follows() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = [line for extra in ("cpu", "benchmarks", "onnx", "dev") for line in extras[extra]]
    assert faults([*PROJECT["dependencies"], *asked], locked_versions()) == []


@cpu_environment
def test_the_lock_is_what_is_installed() -> None:
    installed = {name: metadata.version(name) for name in locked_versions()}
    assert installed == locked_versions()


def test_what_breaks_vllm_is_not_locked() -> None:
    assert not {*ABSENT, *LEFT_OUT} & set(locked_versions())
    named = [Requirement(line).name for line in (ROOT / "requirements/absent.txt").read_text().splitlines() if line[0] != "#"]
    assert tuple(named) == (*ABSENT, *LEFT_OUT)


@cpu_environment
@pytest.mark.parametrize("package", ABSENT)
def test_what_breaks_vllm_is_not_installed(package: str) -> None:
    assert util.find_spec(package) is None


def test_the_version_is_the_same_everywhere() -> None:
    version = orchestrator.__version__
    assert metadata.version("atkd") == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    released = re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0" == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"]


def test_the_console_script_is_the_module() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="atkd")
    assert script.load() is main


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    ci = ROOT / ".ci/run"
    assert ci.stat().st_mode & stat.S_IXUSR
    assert ci.read_text().splitlines()[-1] == "exec make test"


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_template(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("atkd-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    present = [path for room in ROOMS for kind in ("*.py", "*.j2") for path in (ROOT / room).rglob(kind)]
    assert packed == {path.relative_to(ROOT).as_posix() for path in present}
