"""What a page says of command, versions and machines, and how it was written down."""

import json
import subprocess
from pathlib import Path

import pytest

from actors.placement import Node
from orchestrator import __version__
from orchestrator.cluster.environment import command_line, commit_of, installed, node_facts, note_cluster, note_process
from orchestrator.reports.provenance import Command, about_run, environments_of, written_nodes
from orchestrator.reports.search_report import write_search_report
from orchestrator.run.run_dir import RunDir
from tests.orchestrator.config.test_run import changed
from tests.orchestrator.pages import EVIL, Page, bare_run, require_closed
from tests.orchestrator.searches import tuned_on_a_grid


def process(time: float, command: str, **changes: object) -> dict[str, object]:
    return {"time": time, "event": "process_started", "command": command, "atkd": "1", "python": "3", **changes}


def finished(stage: str) -> dict[str, object]:
    return {"time": 0.0, "event": "stage_finished", "stage": stage}


def test_processes_that_ran_on_the_same_stand_together() -> None:
    events = [
        finished("of an older version"), process(1, "a"), finished("prepare"), finished("finetune"), process(2, "idle"),
        process(3, "b"), finished("score"), process(4, "c", atkd="2"), finished("train"), process(5, "last", atkd="2"),
    ]  # fmt: skip
    one, two = environments_of(events)
    assert one.facts == (("atkd", "1"), ("python", "3")) and two.facts == (("atkd", "2"), ("python", "3"))
    assert [(command.command, command.stages) for command in one.commands] == [("a", ("prepare", "finetune")), ("b", ("score",))]
    assert [(command.command, command.stages) for command in two.commands] == [("c", ("train",)), ("last", ())]
    assert isinstance(one.commands[0], Command) and environments_of([]) == []


def test_a_process_is_noted_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/orchestrator/__main__.py", "run", "a.yaml", "name=my run"])
    run = bare_run(tmp_path / "run")
    run_dir = RunDir(run)
    note_process(run_dir)
    note_cluster(run_dir)
    event = json.loads((run / "events.jsonl").read_text().splitlines()[0])
    assert event["command"] == "python -m orchestrator run a.yaml 'name=my run'"
    assert event["packages"]["torch"] and event["cpus"] >= 1 and event["memory_bytes"] > 1 << 28
    about = about_run(run)
    assert about is not None and "easy_ratio: 0.5" in about.config
    (environment,) = about.environment
    facts = dict(environment.facts)
    assert facts["atkd"] == __version__ and facts["torch"] == event["packages"]["torch"]
    assert environment.commands[0].command == event["command"]


def test_what_was_said_otherwise_later_stands_below_the_configuration(tmp_path: Path) -> None:
    RunDir.open(changed(f"output={tmp_path}")).close()
    RunDir.open(changed(f"output={tmp_path}", "train.micro_batch_rows=2", "tune.rungs=3")).close()
    about = about_run(tmp_path / "small")
    assert about is not None and "micro_batch_rows: 8" in about.config
    (change,) = about.changes
    assert change.startswith("resumed 20")
    assert change.endswith(" with train.micro_batch_rows: 2 now, 8 at first; tune.rungs: 3 now, 4 at first")


def test_a_search_shows_what_the_run_above_it_was_asked(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("name: my-run", f"name: {json.dumps(EVIL)}"))
    (run / "events.jsonl").write_text(json.dumps(process(1, f"atkd tune {EVIL}")) + "\n")
    content = write_search_report(tuned_on_a_grid(run / "tune").path.parent).read_text()
    require_closed(content)
    assert "<script" not in content
    assert f"atkd tune {EVIL}" in Page(content).text and "vocab_size: 300" in Page(content).text
    alone = write_search_report(tuned_on_a_grid(tmp_path / "alone").path.parent).read_text()
    assert "Configuration" not in Page(alone).text


def test_a_command_is_written_as_it_is_typed() -> None:
    assert command_line(["/bin/atkd", "run", "a b.yaml"]) == "atkd run 'a b.yaml'"
    assert command_line(["x/orchestrator/__main__.py", "report"]) == "python -m orchestrator report"
    assert command_line(["atkd", "run", "data.token=abcdef"]) == "atkd run 'data.token=(hidden)'"


def test_versions_of_what_is_installed() -> None:
    found = installed(("numpy", "no-such-distribution-here"))
    assert list(found) == ["numpy"] and found["numpy"][0].isdigit()


def test_a_checkout_says_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    unknown = {"commit": None, "changed": None}
    assert commit_of(tmp_path) == unknown
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit_of(tmp_path) == {"commit": head, "changed": False}
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == {"commit": head, "changed": True}
    (tmp_path / "below").mkdir()
    assert commit_of(tmp_path / "below") == unknown, "a folder within somebody's checkout"
    (tmp_path / "below" / ".git").write_text("gitdir: nowhere")
    assert commit_of(tmp_path / "below") == unknown, "a checkout that is broken"


def test_nodes_are_noted_without_their_addresses() -> None:
    total = {"CPU": 8.0, "GPU": 2.0, "memory": 1e9, "accelerator_type:H100": 1.0, "node:10.0.0.1": 1.0}
    facts = node_facts(Node("10.0.0.1", total))
    assert facts == {"cpus": 8.0, "gpus": 2.0, "accelerators": ["H100"], "memory_bytes": 1_000_000_000}
    assert written_nodes([facts, facts, node_facts(Node("x", {"CPU": 0.5}))]) == "2 × 8 CPUs, 2 GPUs (H100); 1 node, 0.5 CPUs"
    assert written_nodes([]) == ""
