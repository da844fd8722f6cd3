"""The judge of a run: its answers are judged once they are there, without devices, and what comes of it joins the table.

judge/verdicts.jsonl     each verdict with the reply it was read from; what stands there is not asked for again
evaluation/judge.json    figures, counts, failures, tokens, cost
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from actors.config.judge import JudgeConfig
from actors.evaluation.answers import GeneratedAnswer
from actors.files import write_atomically
from actors.format import duration, plural
from orchestrator.config.run import RunConfig
from orchestrator.judging.asking import Asked, Failures, ask_missing
from orchestrator.judging.figures import PairFigure, RatingFigure, pair_figure, rating_figure
from orchestrator.judging.prompts import load_template
from orchestrator.judging.questions import Question, QuestionMaker, identity_of
from orchestrator.judging.replies import FailureKind
from orchestrator.judging.server import address_of
from orchestrator.judging.verdicts import VerdictBook
from orchestrator.run.evaluation import read_evaluation
from orchestrator.run.results_table import MODEL_NAMES, Show, TableRow, read_table, write_table
from orchestrator.run.run_dir import RunDir

if TYPE_CHECKING:
    from orchestrator.judging.client import JudgeClient

logger = logging.getLogger("atkd")

MEASURED = "student_after"
"""Whose answers are compared with those of the others, pair by pair."""
OPPONENTS = tuple(name for name in MODEL_NAMES if name != MEASURED)

RATING_ROWS: tuple[tuple[str, str, Show], ...] = (
    ("ratio", "ratings, share of the reference's", "share"),
    ("low", "95 % interval, from", "share"),
    ("high", "95 % interval, to", "share"),
    ("mean", "mean rating, 1 to 10", "score"),
    ("reference_mean", "mean rating of the reference beside it", "score"),
    ("rows", "rows judged", "count"),
)
PAIR_ROWS: tuple[tuple[str, str, Show], ...] = (
    ("win", "student after wins against it", "share"),
    ("tie", "ties", "share"),
    ("loss", "student after loses against it", "share"),
    ("disagree", "orders that disagree", "share"),
    ("rows", "rows judged", "count"),
)
"""Field of a figure, label in the table, and how values are written."""


@dataclass(frozen=True, slots=True)
class Judging:
    """What a judge said of a run's answers, and what it took."""

    protocol: str
    model: str
    """The judge's."""
    address: str
    """Of its server."""
    verdicts: int
    """Questions that have a verdict; equal ones count once."""
    asked: int
    """Questions that were asked the last time; the others were known."""
    failures: Mapping[FailureKind, int]
    """Questions without a verdict, by kind."""
    examples: Mapping[FailureKind, str]
    """One of each kind."""
    tokens_in: int
    """Tokens that the judge read for these verdicts, and for those that failed the last time."""
    tokens_out: int
    """Tokens that it wrote for them."""
    cost: float | None
    """Of these tokens, in the unit of the prices; None where there are no prices."""
    seconds: float
    """Of the last time."""
    ratings: tuple[RatingFigure, ...] = ()
    """One a model, where the protocol is ``rating``."""
    pairs: tuple[PairFigure, ...] = ()
    """One an opponent, where it is ``pairwise``."""

    def lines(self) -> list[str]:
        """Return in sentences who judged, what failed and what it cost."""
        lines = [
            f"{self.model} at {urlsplit(self.address).netloc} judged by {self.protocol}: {plural(self.verdicts, 'verdict')}; "
            f"{plural(self.asked, 'question')} asked the last time, in {duration(self.seconds)}"
        ]
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        lines.append(f"{self.tokens_in:,} tokens read and {self.tokens_out:,} written{cost}")
        lines += [f"without a verdict: {count} × {kind}, such as {self.examples[kind]}" for kind, count in self.failures.items()]
        return lines


def require_judge(config: RunConfig, run_dir: RunDir) -> None:
    """Raise before the run's time is spent if its judge could not be asked; nothing where there is none, or it has judged.

    Raises:
        ValueError: naming what is wrong with key, address, model or template, and what would do.
    """
    settings = config.evaluate.judge
    if settings is None:
        return
    load_template(settings)
    if run_dir.result("judge") is None:
        with _client(settings):
            pass


def judge(config: RunConfig, run_dir: RunDir, again: bool = False) -> None:
    """Have the run's answers judged, asking what is not known yet, and put the figures into the table.

    Args:
        config: of the run, with a judge.
        run_dir: of a run whose models have answered.
        again: ask once more for what failed the last time.

    Raises:
        ValueError: if the judge cannot be asked, or there are no answers.
        JudgeFailed: if too many questions stay without a verdict.
    """
    settings, answers = _settings_of(config), _answers_of(config, run_dir.path)
    questions = questions_of(settings, answers)
    identity = identity_of(questions)
    facts = run_dir.result("judge")
    if facts is not None and facts["questions"] == identity and not again:
        logger.info("judge: done before")
    else:
        run_dir.event("stage_started", stage="judge")
        judging = _judged(settings, questions, answers, run_dir.path, config.seed)
        write_judging(run_dir.path, judging)
        for line in judging.lines():
            logger.info(f"judge: {line}")
        counts = {"verdicts": judging.verdicts, "asked": judging.asked, "failures": dict(judging.failures)}
        run_dir.finish("judge", {"questions": identity, **counts, "seconds": round(judging.seconds, 2)})
    found = read_judging(run_dir.path)
    assert found is not None
    write_table(run_dir.path, replace(read_table(run_dir.path), judge=judge_rows(found)))


def judge_again(config: RunConfig) -> None:
    """Judge a run that was evaluated before, with this judge or another one; see ``judge``.

    Raises:
        ValueError: if there is no judge, the run has no answers, or the judge cannot be asked.
        JudgeFailed: if too many questions stay without a verdict.
    """
    _settings_of(config)
    if not (config.run_dir / "config.yaml").is_file():
        raise ValueError(f"there is no run in {config.place}; the command run makes it, and judges its answers")
    with RunDir.open(config) as run_dir:
        if run_dir.result("evaluate") is None:
            raise ValueError(f"the run in {config.place} has no answers yet; the command evaluate makes them")
        judge(config, run_dir, again=True)


def questions_of(settings: JudgeConfig, answers: Mapping[str, Sequence[GeneratedAnswer]]) -> list[Question]:
    """Return all that a judge is asked about the answers of the models, by their names."""
    maker = QuestionMaker(settings, address_of(settings), load_template(settings))
    return maker.ratings(answers) if settings.protocol == "rating" else maker.pairs(answers, MEASURED, OPPONENTS)


def judge_rows(judging: Judging) -> tuple[TableRow, ...]:
    """Return the rows of the table: a rating a model, or how the student after fares against each of the others."""
    if judging.protocol == "rating":
        rated = {figure.model: figure for figure in judging.ratings}
        return tuple(
            TableRow(f"judge_{name}", label, show, tuple(getattr(rated[model], name) for model in MODEL_NAMES))
            for name, label, show in RATING_ROWS
        )
    met = {figure.against: figure for figure in judging.pairs}
    return tuple(
        TableRow(
            f"judge_{name}", label, show,
            tuple(getattr(met[model], name) if model in met else None for model in MODEL_NAMES),
        )
        for name, label, show in PAIR_ROWS
    )  # fmt: skip


def write_judging(run: Path, judging: Judging) -> None:
    """Write ``evaluation/judge.json``."""
    write_atomically(run / "evaluation" / "judge.json", json.dumps(asdict(judging), indent=1, ensure_ascii=False).encode())


def read_judging(run: Path) -> Judging | None:
    """Return what ``write_judging`` wrote; None where nothing was judged."""
    path = run / "evaluation" / "judge.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    plain = {one.name: content[one.name] for one in fields(Judging)}
    plain["ratings"] = tuple(RatingFigure(**figure) for figure in content["ratings"])
    plain["pairs"] = tuple(PairFigure(**figure) for figure in content["pairs"])
    return Judging(**plain)


def _judged(
    settings: JudgeConfig, questions: Sequence[Question], answers: Mapping[str, Sequence[GeneratedAnswer]], run: Path, seed: int
) -> Judging:
    book = VerdictBook(run / "judge" / "verdicts.jsonl")
    asked = _asked(settings, questions, book)
    known = {question.key: found for question in questions if (found := book.get(question)) is not None}
    tokens_in = sum(one.tokens_in for one in known.values()) + asked.failures.tokens_in
    tokens_out = sum(one.tokens_out for one in known.values()) + asked.failures.tokens_out
    rating = settings.protocol == "rating"
    return Judging(
        settings.protocol, settings.model, address_of(settings), len(known), asked.asked, asked.failures.counts,
        asked.failures.examples, tokens_in, tokens_out, cost_of(settings, tokens_in, tokens_out), asked.seconds,
        ratings=tuple(rating_figure(name, questions, book, seed) for name in MODEL_NAMES) if rating else (),
        pairs=() if rating else tuple(pair_figure(answers, MEASURED, one, questions, book) for one in OPPONENTS),
    )  # fmt: skip


def cost_of(settings: JudgeConfig, tokens_in: int, tokens_out: int) -> float | None:
    """Return what tokens cost, in the unit of the prices; None where there are no prices."""
    if settings.input_price is None or settings.output_price is None:
        return None
    return (tokens_in * settings.input_price + tokens_out * settings.output_price) / 1e6


def _asked(settings: JudgeConfig, questions: Sequence[Question], book: VerdictBook) -> Asked:
    if all(book.get(question) is not None for question in questions):
        return Asked(0, Failures(), 0.0)
    with _client(settings) as client:
        return ask_missing(questions, book, client, settings)


@contextmanager
def _client(settings: JudgeConfig) -> "Iterator[JudgeClient]":
    """Yield a client whose server has answered once."""
    # Importing OpenAI's package takes a second, which a run without a judge need not spend.
    from orchestrator.judging.client import JudgeClient

    with closing(JudgeClient(settings)) as client:
        client.require_answers()
        yield client


def _settings_of(config: RunConfig) -> JudgeConfig:
    if config.evaluate.judge is None:
        raise ValueError(
            "evaluate.judge is null, so there is nobody to judge; 'evaluate.judge={model: NAME, base_url: "
            "http://localhost:8000/v1, api_key_variable: null}' would do"
        )
    return config.evaluate.judge


def _answers_of(config: RunConfig, run: Path) -> dict[str, tuple[GeneratedAnswer, ...]]:
    settings = _settings_of(config)
    answers = {name: read_evaluation(run / "evaluation" / f"{name}.json").answers[: settings.rows] for name in MODEL_NAMES}
    assert answers[MEASURED], "evaluate.generate_rows is not 0, and cannot have changed"
    return answers
