"""The life of a run: rows become tokens, a teacher scores them once, a student learns from the scores, both are examined."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from orchestrator.cluster.environment import note_cluster, note_process
from orchestrator.cluster.ray_session import ray_for
from orchestrator.config.run import RunConfig
from orchestrator.reports.run_report import write_report
from orchestrator.run.evaluation import evaluate
from orchestrator.run.export import export
from orchestrator.run.models import ROLES, Models
from orchestrator.run.results_table import print_table, read_table
from orchestrator.run.run_dir import RunDir
from orchestrator.run.scoring import ScoringStage
from orchestrator.run.stages import finetune, prepare, require_same_source, train

STAGES = ("prepare", "finetune", "score", "train", "evaluate", "export", "report")


def run(config: RunConfig, until: str = "report", say: Callable[[str], None] = print) -> Path:
    """Live the life of a run as far as the stage ``until``, skipping what is done; return the run's folder."""
    assert until in STAGES
    with RunDir.open(config, say) as books:
        for finished in life(config, books, overlap=config.scores.overlap and until != "score"):
            if finished == until:
                break
        return books.path


def life(config: RunConfig, books: RunDir, overlap: bool) -> Iterator[str]:
    """Do stage after stage; yield the name of each once its result stands."""
    note_process(books)
    models = Models(config, books.path)
    require_same_source(config, books.stage("prepare", partial(prepare, config, books, models)))
    yield "prepare"

    with nullcontext() if books.result("evaluate") else ray_for(config):
        note_cluster(books)
        for role in ROLES:
            if models.side(role).finetune is not None:
                books.stage(f"finetune_{role}", partial(finetune, role, config, books, models))
        yield "finetune"

        scoring = ScoringStage(config, books, models)
        if not overlap:
            scoring.run()
            yield "score"
        with scoring.in_background() if overlap else nullcontext():
            books.stage("train", partial(train, config, books, models, scoring.training_store))
        yield "train"

        books.stage("evaluate", partial(evaluate, config, books, models, scoring.heldout_store))
        yield "evaluate"

    books.stage("export", partial(export, config, books, models, scoring.training_store))
    yield "export"
    report = write_report(books.path)
    show_results(books, models, report)
    yield "report"


def show_results(books: RunDir, models: Models, report: Path) -> None:
    """End with the table, and where to look."""
    print_table(read_table(books.path))
    books.say(f"report: {report}")
    books.say(f"student: {models.student_folder}")
