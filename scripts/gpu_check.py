"""Try what only a GPU can show, and write what came of it into docs/results_gpu.md. What ``make gpu`` runs.

    python -m scripts.gpu_check [--model NAME] [--teacher NAME] [--output runs/gpu] [--page docs/results_gpu.md] [--only STEP ...]

The steps are those of ``gpu_steps``. One that fails or exceeds its limit is said on the page, and the next one begins. All of it
ends within an hour. Exit code 1 if a step failed, 2 where torch can use no GPU.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.cluster.environment import PACKAGES, commit_of, installed
from orchestrator.cluster.node_checks import describe
from orchestrator.cluster.node_facts import NodeFacts, read_node_facts
from scripts.gpu_steps import Step, steps

ROOT = Path(__file__).parents[1]
HOUR_SECONDS = 3_500.0
"""All steps together."""
PATIENCE_SECONDS = 20.0
"""Between asking a step to end and killing it."""
TAIL_LINES = 15
"""Of the output of a step that failed."""
STEP_NAMES = tuple(step.name for step in steps(1, "", "", ""))
SMALL_MODEL, TEACHER = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step."""

    step: Step
    """What was run."""
    word: str
    """``passed``, ``FAILED``, ``FAILED: over its limit``, or ``left out`` and why."""
    seconds: float = 0.0
    """How long it took."""
    lines: tuple[str, ...] = ()
    """What was read off it; the end of its output if it failed."""

    @property
    def failed(self) -> bool:
        """Whether it was run and did not end well."""
        return self.word.startswith("FAILED")


def run_all(wanted: Sequence[Step], gpus: int, logs: Path, seconds: float, say: Callable[[str], None] = print) -> list[Outcome]:
    """Run steps one after the other, whatever comes of each; none is begun, or goes on, once so many seconds are over."""
    end, found = time.monotonic() + seconds, []
    for step in wanted:
        left = end - time.monotonic()
        if step.needs_gpus > gpus:
            outcome = Outcome(step, f"left out: needs {step.needs_gpus} GPUs, and there is {gpus}")
        elif left <= 0:
            outcome = Outcome(step, "left out: the time of all steps was over")
        else:
            say(f"{step.name}: {shlex.join(step.command)}")
            outcome = run_step(step, logs, min(step.limit_seconds, left))
        say(f"{step.name}: {outcome.word} after {outcome.seconds:.0f} s")
        found.append(outcome)
    return found


def run_step(step: Step, logs: Path, limit_seconds: float) -> Outcome:
    """Run one step to its end or its limit, with its output in a file of its own."""
    logs.mkdir(parents=True, exist_ok=True)
    log, started = logs / f"{step.name.replace(' ', '_')}.log", time.monotonic()
    words = [sys.executable if word == "python" else word for word in step.command]
    word = "passed"
    with open(log, "wb") as file:
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if process.wait(limit_seconds):
                word = f"FAILED: exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            word = f"FAILED: over its limit of {limit_seconds:.0f} s"
            end(process)
        except BaseException:
            end(process)
            raise
    seconds, printed = time.monotonic() - started, log.read_text(errors="replace")
    if word == "passed":
        try:
            return Outcome(step, word, seconds, tuple(step.read(printed)))
        except (KeyError, ValueError, IndexError) as error:
            word = f"FAILED: what it left could not be read ({type(error).__name__}: {error})"
    return Outcome(step, word, seconds, tuple(printed.splitlines()[-TAIL_LINES:]))


def end(process: subprocess.Popen[bytes]) -> None:
    """End a step with all that it has started: asked first, killed if it does not go."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=2.0)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive, timeout=5.0)


def page_of(outcomes: Sequence[Outcome], facts: NodeFacts, names: Sequence[str], day: str) -> str:
    """Return the page: the machine, what came of each step, and what each measured, with its command."""
    gpus = ", ".join(f"{count} x {name}" for name, count in Counter(names).items()) or "no GPU that nvidia-smi names"
    packages = ", ".join(f"{name} {version}" for name, version in installed(PACKAGES).items())
    source = commit_of(ROOT)
    commit = f"commit {source['commit'][:12]}{' with changes' if source['changed'] else ''}" if source["commit"] else "no commit"
    lines = [
        "# Measured on GPUs", "", f"Written by `make gpu` on {day}, from what it measured; not by hand.", "",
        f"- {gpus}; {describe(facts)}", f"- Python {sys.version.split()[0]}; {packages}", f"- {commit}", "",
        "| step | outcome | seconds |", "|---|---|---:|",
        *(f"| {one.step.name} | {one.word} | {one.seconds:.0f} |" for one in outcomes),
    ]  # fmt: skip
    for one in outcomes:
        if not one.word.startswith("left out"):
            lines += ["", f"## {one.step.name}", "", "```bash", shlex.join(one.step.command), "```", "", *shown(one)]
    return without_places("\n".join(lines) + "\n")


def shown(outcome: Outcome) -> list[str]:
    """Return the lines of a step as Markdown: tables as they are, others as a list; the end of an output as it was."""
    if outcome.failed:
        return [f"{outcome.word}. The end of its output:", "", "```text", *outcome.lines, "```"]
    if not outcome.lines:
        return ["Nothing to read off it."]
    found: list[str] = []
    for line in outcome.lines:
        table = line.startswith("|")
        if found and table != found[-1].startswith("|"):
            found.append("")
        found.append(line if table else f"- {line}")
    return found


def without_places(text: str) -> str:
    """Return a text without the folders of this machine."""
    for folder, name in ((str(ROOT), "."), (sys.prefix, ".venv"), (os.path.expanduser("~"), "~")):
        text = text.replace(folder, name) if len(folder) > 1 else text
    return text


def gpu_names() -> list[str]:
    """Return the name of each GPU, as nvidia-smi has it; none where there is no such program."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def main(arguments: Sequence[str]) -> int:
    """Run the steps and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=SMALL_MODEL, help="a small pretrained model: hub name or folder")
    parser.add_argument("--teacher", default=TEACHER, help="a pretrained model whose head is wider than its tokenizer")
    parser.add_argument("--output", default="runs/gpu", help="folder in which a new one is made, for runs and logs")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results_gpu.md")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=STEP_NAMES, help=f"some of: {', '.join(STEP_NAMES)}")
    options = parser.parse_args(arguments)
    facts = read_node_facts()
    if not facts.usable_gpus:
        print(f"error: torch can use no GPU; {describe(facts)}", file=sys.stderr)
        return 2
    output = f"{options.output}/{time.strftime('%Y%m%d-%H%M%S')}"  # a new folder: a run that is there would be found finished
    table = steps(facts.usable_gpus, output, options.model, options.teacher)
    wanted = [step for step in table if options.only is None or step.name in options.only]
    outcomes = run_all(wanted, facts.usable_gpus, ROOT / output / "logs", HOUR_SECONDS)
    options.page.write_text(page_of(outcomes, facts, gpu_names(), time.strftime("%Y-%m-%d")), encoding="utf-8")
    print(f"written: {options.page}")
    return int(any(one.failed for one in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
