"""The command line. Imports neither torch nor Ray before the configuration stands."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from orchestrator.cluster.places import settle_home

PIPELINE = {
    "run": ("report", "run the whole pipeline: prepare, finetune, score, train, evaluate, export, report"),
    "prepare": ("prepare", "read the data, make tokens and masks, and show the counts"),
    "finetune": ("finetune", "run up to the fine-tuned teacher"),
    "respond": ("respond", "run up to the responses that a model writes, where the section responses asks for it"),
    "score": ("score", "run up to the complete score store"),
    "train": ("train", "run up to the distilled student"),
    "evaluate": ("evaluate", "run up to the table of teacher, student before and student after"),
    "export": ("export", "run up to the student's folder with its model card"),
    "report": ("report", "run up to the report page"),
}
"""For each command that runs the pipeline, the last stage, and its help. What is done is not done again."""

TRIALS = {
    "tune": "search the space of the section tune: one scoring, many trainings; ends in the best one's configuration",
    "compare": "train the same student in several ways with several seeds; ends in differences and how sure they are",
}
"""Commands that train many students on one scoring."""

OTHERS = ("doctor", "plan", "verify", "judge", "benchmark", "predict", "config")

READERS = ("plan", "verify", "judge", "benchmark", "predict")
"""Commands that look into the run's folder before they work in it."""

PLAN_HELP = "say what a run will take and whether a cluster has it, before anything starts: memory, bytes, hours, bottleneck"
VERIFY_HELP = "read a run's score stores whole and compare each row with its checksum"
JUDGE_HELP = "have the judge of evaluate.judge judge a run's answers, asking what is not known yet; needs no devices"
BENCHMARK_HELP = "measure a run's models by the tasks of evaluate.benchmarks that are not measured yet"
PREDICT_HELP = "have a finished run's student, or its teacher, answer the rows of a file: labels with probabilities, or text"
DOCTOR_HELP = "prove on a few rows that the teacher's scores would be right, before it scores them all"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="atkd", description="Distil a large language model into a small one: score once, teach many.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in PIPELINE.items():
        _add_config_arguments(commands.add_parser(name, help=text, description=text))
    for name, text in TRIALS.items():
        _add_config_arguments(commands.add_parser(name, help=text, description=text))
    _add_config_arguments(commands.add_parser("doctor", help=DOCTOR_HELP, description=DOCTOR_HELP))
    plan = commands.add_parser("plan", help=PLAN_HELP, description=PLAN_HELP)
    _add_config_arguments(plan)
    _add_plan_arguments(plan)
    _add_config_arguments(commands.add_parser("verify", help=VERIFY_HELP, description=VERIFY_HELP))
    _add_config_arguments(commands.add_parser("judge", help=JUDGE_HELP, description=JUDGE_HELP))
    _add_config_arguments(commands.add_parser("benchmark", help=BENCHMARK_HELP, description=BENCHMARK_HELP))
    _add_predict_arguments(commands.add_parser("predict", help=PREDICT_HELP, description=PREDICT_HELP))
    _add_config_arguments(commands.add_parser("config", help="print the whole configuration, defaults included"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0 done, 1 failed, 2 asked for something that cannot be, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    _require_command(parser, words)
    options = parser.parse_args(words)
    from orchestrator.config.load import dump_config, load_config, load_run

    try:
        if options.command == "predict":
            config, folder = load_run(options.config, options.overrides)
        else:
            config = load_config(options.config, options.overrides)
            folder = config.run_dir
        if options.command == "config":
            print(dump_config(config), end="")
            return 0
        settle_home()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        from orchestrator.failure import guarded
    except (Exception, KeyboardInterrupt) as error:
        return _not_begun(error)

    def work() -> int:
        if config.mirror is not None and options.command in READERS:
            config.mirror.sync()
        code = command()
        if config.mirror is not None:
            config.mirror.sync()  # pages are written when the run is closed
        return code

    def command() -> int:
        from orchestrator import commands

        if options.command not in ("verify", "judge"):
            from orchestrator.models.models import renew_copies

            renew_copies(config, weights=options.command != "plan" or options.probe)
        if options.command in PIPELINE:
            return commands.run(config, PIPELINE[options.command][0])
        if options.command == "plan":
            from orchestrator.planning.plan import PlanOptions

            return commands.plan(config, PlanOptions(**_said(options, PlanOptions)))
        if options.command == "predict":
            from orchestrator.predicting.options import PredictOptions

            return commands.predict(config, folder, PredictOptions(**_said(options, PredictOptions)))
        others = {
            "tune": commands.search, "compare": commands.comparison, "doctor": commands.doctor, "verify": commands.verify,
            "judge": commands.judge, "benchmark": commands.benchmark,
        }  # fmt: skip
        return others[options.command](config)

    return guarded(config, work, _level_of(options), of_the_run=options.command not in ("plan", "verify", "predict"))


def _said(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return what the command line says of each field of a command's own record of options."""
    return {field.name: getattr(options, field.name) for field in fields(kind)}


def _level_of(options: argparse.Namespace) -> int:
    """Return from which level on lines are shown; a plan as JSON is alone on its output."""
    if options.quiet or getattr(options, "as_json", False):
        return logging.WARNING
    return logging.DEBUG if options.verbose else logging.INFO


def _require_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    known = (*PIPELINE, *TRIALS, *OTHERS)
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and first not in known:
        from orchestrator.config.load import no_such_name

        parser.error(f"argument COMMAND: {no_such_name(first, known)}")


def _not_begun(error: BaseException) -> int:
    """Print why the libraries that every command needs cannot be imported; return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("error: interrupted before anything was begun", file=sys.stderr)
        return 130
    from orchestrator.error_log import write_traceback_elsewhere

    print(
        f"error: what every command needs cannot be imported ({type(error).__name__}: {error}); make setup installs the versions "
        "that were tested",
        file=sys.stderr,
    )
    if (log := write_traceback_elsewhere(error)) is not None:
        print(f"the traceback is in {log}", file=sys.stderr)
    return 1


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, such as configs/tiny_cpu.yaml")
    _add_shared_arguments(parser)


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="such as loss.easy_ratio=0.3")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("-q", "--quiet", action="store_true", help="show the result and warnings only")
    shown.add_argument("-v", "--verbose", action="store_true", help="show every event, and what Ray's workers print")


def _add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RUN", help="YAML file of a run, or the folder that the run has left")
    parser.add_argument("rows", metavar="ROWS", help="file of the rows, such as rows.jsonl; labels and answers need not be there")
    _add_shared_arguments(parser)
    parser.add_argument("--output", metavar="FILE", help="file of the answers; default ROWS with the suffix .predicted.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace answers that are there")
    parser.add_argument("--model", choices=("student", "teacher"), default="student", help="who answers; default student")
    parser.add_argument("--batch-rows", type=int, metavar="N", help="rows that are answered at one time")
    parser.add_argument("--format-of", metavar="KEY", help="source whose format the rows have, such as data.sources.1")
    parser.add_argument("--engine", choices=("vllm", "transformers"), help="of language models; default vLLM where it can")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer; default evaluate.max_new_tokens")
    parser.add_argument("--temperature", type=float, metavar="T", help="default 0: the most likely token")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that hold this share; default 1")
    parser.add_argument("--seed", type=int, metavar="N", help="draws the tokens; default the run's")


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, metavar="N", help="plan for a cluster of N GPUs, not for the machines that are there")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="GiB of each GPU")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of each node, with --gpus; default 8")
    parser.add_argument("--gpu-tflops", type=float, default=312.0, metavar="T", help="16-bit TFLOP/s of a GPU; default 312")
    parser.add_argument("--rows", type=int, metavar="N", help="training rows, where the data is not to be read")
    parser.add_argument("--row-tokens", type=float, metavar="T", help="tokens of a row on average, with --rows")
    parser.add_argument("--row-targets", type=float, metavar="N", help="targets of a row on average, with --rows")
    parser.add_argument("--probe", action="store_true", help="measure one replica and one worker for a minute")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object and nothing else")
