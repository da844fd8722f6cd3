"""The page on clusters: its table of variables is the code's, its YAML and its shell parse, its selectors are keys of ours."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from actors.config.models import EngineConfig
from actors.config.workers import WorkersConfig
from orchestrator.cluster.ray_session import TRAIN_ENVIRONMENT
from orchestrator.run import run_dir
from tests.test_docs import commands_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
ROOMS = ("orchestrator", "actors", "losses", "tune_spaces")
NO_VARIABLES = {"CAUSAL_LM", "STRICT_PACK", "UNSAFE_CODE"}  # words of libraries that look like names of variables


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


def table_under(words: str) -> dict[str, str]:
    """The rows of the table after some words: what is in backticks first, and the second cell."""
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", PAGE.split(words)[1].split("\n\n")[1], re.MULTILINE)
    return {name: meaning for names, meaning in rows for name in re.findall(r"`(\w+)`", names)}


OURS_TO_SAY = table_under("What the code reads or sets.")


def variables_in_the_code() -> set[str]:
    """Every string of the code that is the name of a variable and nothing more."""
    trees = [ast.parse(path.read_text()) for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    strings = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {one for one in strings if isinstance(one, str) and re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", one)} - NO_VARIABLES


def test_the_table_of_variables_is_that_of_the_code() -> None:
    assert set(OURS_TO_SAY) == variables_in_the_code()
    said = {name: how.split()[2] for name, how in OURS_TO_SAY.items() if how.endswith("unless set")}
    assert said == TRAIN_ENVIRONMENT
    assert {name for name, how in OURS_TO_SAY.items() if how == "read"} == {"RAY_ADDRESS", run_dir.SUBMITTED_JOB}


def test_variables_of_others_are_none_of_ours() -> None:
    theirs = table_under("What Ray and Hugging Face read")
    assert {"RAY_JOB_STOP_WAIT_TIME_S", "RAY_API_SERVER_ADDRESS", "HF_TOKEN"} <= set(theirs)
    assert not set(theirs) & set(OURS_TO_SAY)


def test_the_examples_of_keys_are_keys_of_ours() -> None:
    keys, elastic = (yaml.safe_load(block) for block in blocks("yaml"))
    assert WorkersConfig.model_validate(elastic["workers"]).most == 8
    EngineConfig.model_validate(keys["teacher"]["engine"])
    WorkersConfig.model_validate(keys["workers"])


def test_each_file_that_a_command_names_is_there() -> None:
    named = set(re.findall(r"\b(?:deploy|requirements)/[\w./-]+", "\n".join(blocks("bash"))))
    assert {"deploy/slurm/distil.sbatch", "deploy/kuberay/cluster", "requirements/gpu.lock"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_each_file_of_the_folder_is_named_on_the_page() -> None:
    files = [path for path in (ROOT / "deploy").rglob("*") if path.is_file() and path.name != "kustomization.yaml"]
    pages = PAGE + (ROOT / "docs" / "observability.md").read_text()
    assert [path for path in files if path.relative_to(ROOT).as_posix() not in pages] == []


@pytest.mark.parametrize("script", blocks("bash"), ids=lambda script: script.splitlines()[0])
def test_the_shell_parses(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_each_command_that_can_be_a_job_is_shown_as_one() -> None:
    shown = {command[0] for command in commands_of(PAGE)}
    assert {"run", "tune", "compare", "score"} <= shown


