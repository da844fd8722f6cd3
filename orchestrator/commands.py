"""The commands: each runs its part, prints what came of it, writes its page, and returns an exit code."""

import json
import logging
from pathlib import Path

from actors.config.places import within
from actors.score_store.store import ScoreStore
from actors.storage.transfers import require_writable, upload
from orchestrator.cluster.run_copies import place_of
from orchestrator.config.run import RunConfig
from orchestrator.doctor.doctor import diagnose
from orchestrator.models.models import Models
from orchestrator.planning.plan import PlanOptions, make_plan
from orchestrator.planning.report import as_plain, print_plan
from orchestrator.predicting.options import PredictOptions
from orchestrator.predicting.predicting import predict as answers_of
from orchestrator.reports.run_report import write_report
from orchestrator.reports.search_report import write_search_report
from orchestrator.reports.teachers_report import write_teachers_report
from orchestrator.run import pipeline
from orchestrator.run.benchmarking import benchmark_again
from orchestrator.run.judging import judge_again
from orchestrator.run.results_table import print_table, read_table
from orchestrator.search.compare import compare
from orchestrator.search.compare_teachers import compare_teachers
from orchestrator.search.ledger import read_ledger
from orchestrator.search.results import best_trial, describe_best, print_trial_table
from orchestrator.search.tune import tune

logger = logging.getLogger("atkd")


def run(config: RunConfig, until: str = "report") -> int:
    """Run the pipeline as far as the stage ``until``; at its end write the page and print the table."""
    published = within(config.export.publish, config.name) if config.export.publish and until == "report" else None
    if published is not None:
        require_writable(published)  # before the hours that come
    folder = pipeline.run(config, until="export" if until == "report" else until)
    if until == "report":
        report, student = write_report(folder), Models(config, folder).student_folder
        print_table(read_table(folder))
        logger.info(f"report: {place_of(config.mirror, report)}")
        logger.info(f"student: {place_of(config.mirror, student)}")
        if published is not None:
            for path in (student, report, folder / "table.json", folder / "config.yaml"):
                upload(path, published)
            logger.info(f"published: {published}")
    return 0


def search(config: RunConfig) -> int:
    """Search the space of the section ``tune``; print the trials and write their page."""
    show_trials(tune(config), config)
    return 0


def comparison(config: RunConfig) -> int:
    """Compare the arms of the section ``compare``, under each of its teachers; print the trials and write the pages."""
    if not config.compare.teachers:
        show_trials(compare(config), config)
        return 0
    taught = compare_teachers(config)
    folder = config.run_dir / config.compare.name
    for one in taught:
        show_trials(folder / one.teacher / "compare", config)
    logger.info(f"report: {place_of(config.mirror, write_teachers_report(config.name, taught, folder))}")
    return 0


def show_trials(folder: Path, config: RunConfig) -> None:
    """Print the trials of the search in a folder, best first, write its page, and log where things stand."""
    found = read_ledger(folder / "ledger.jsonl")
    print_trial_table(found)
    if (best := best_trial(found)) is not None:
        logger.info(describe_best(found, best))
        logger.info(f"its configuration: {place_of(config.mirror, folder / 'best.yaml')}")
    logger.info(f"report: {place_of(config.mirror, write_search_report(folder))}")


def doctor(config: RunConfig) -> int:
    """Print a line for each check of a run before its teacher scores; return 1 if one failed.

    Raises:
        ValueError: if no predictions are taught, or as the stages before the scoring do.
    """
    if config.teacher.similar_tokens is not None:
        raise ValueError(
            "doctor looks whether served predictions are the teacher's, and with teacher.similar_tokens none are taught; the "
            "command run would do"
        )
    findings = diagnose(config)
    for finding in findings:
        print(finding.line(), flush=True)
    return int(any(finding.state == "FAILED" for finding in findings))


def verify(config: RunConfig) -> int:
    """Read the score stores of a run whole; print a line for each.

    Raises:
        ValueError: naming the first file that is not what was written, or that there are no stores yet.
    """
    pointers = config.run_dir / "scores.json"
    if not pointers.exists():
        raise ValueError(f"{config.place} has no score stores yet; the command score fills them")
    for split, path in json.loads(pointers.read_text()).items():
        store = ScoreStore(path)
        store.verify()
        there = store.shard_count - len(store.missing_shards())
        print(f"{split}: {there} of {store.shard_count} shards are there, each row as it was written, in {path}", flush=True)
    return 0


def judge(config: RunConfig) -> int:
    """Have the answers of a run that was evaluated judged, asking what is not known yet; write its page and print its table.

    Raises:
        ValueError: if there is no judge, nothing to judge, or the judge cannot be asked.
        JudgeFailed: if too many questions stay without a verdict.
    """
    judge_again(config)
    report = write_report(config.run_dir)
    print_table(read_table(config.run_dir))
    logger.info(f"report: {place_of(config.mirror, report)}")
    return 0


def benchmark(config: RunConfig) -> int:
    """Measure a run that was evaluated by the tasks of ``evaluate.benchmarks``; write its page and print its table.

    Raises:
        ValueError: if there are no benchmarks, the run is not evaluated yet, or a task cannot be measured.
    """
    benchmark_again(config)
    report = write_report(config.run_dir)
    print_table(read_table(config.run_dir))
    logger.info(f"report: {place_of(config.mirror, report)}")
    return 0


def predict(config: RunConfig, folder: Path, options: PredictOptions) -> int:
    """Have the model of a finished run answer the rows of a file.

    Raises:
        ValueError: naming the option, the row or the key that cannot be.
        WritingFailed: if a language model failed.
    """
    logger.info(f"answers: {answers_of(config, folder, options)}")
    return 0


def plan(config: RunConfig, options: PlanOptions) -> int:
    """Print what a run takes, as JSON if asked; return 0 if the run fits, 1 if it does not.

    Raises:
        ValueError: naming what is missing or cannot be.
    """
    made = make_plan(config, options)
    if options.as_json:
        print(json.dumps(as_plain(made), indent=1))
    else:
        print_plan(made)
    return 0 if made.fits else 1
