"""The doctor of runs of classification: rows, labels, what the teacher is made of, and its scores of a few rows. C classes.

It measures here; ``class_checks`` draws the conclusions.
"""

import json
import logging
import tempfile
from pathlib import Path

import numpy as np

from actors.config.model_kinds import PretrainedModel
from actors.config.networks import SoftLabels
from actors.engines.base import EngineFactory, TeacherSpec
from actors.examples import ExampleFile
from actors.models import load_model
from actors.records import Example
from actors.teacher.class_parity import ClassParity, measure_classes
from orchestrator.classification.label_words import prompt_window, read_asked
from orchestrator.classification.preparation import read_rows
from orchestrator.classification.rows import SPLITS, ClassCounts, read_counts
from orchestrator.cluster.ray_session import ray_for
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.doctor.class_checks import check_class_scores, check_labels, check_table, check_words
from orchestrator.doctor.run_checks import check_export
from orchestrator.doctor.serving import folder_of_doctor, measured_on, on_gpu, rows_path, score_probe
from orchestrator.models.classifiers import window_of_classifier
from orchestrator.models.models import ROLES, Models, config_of
from orchestrator.run.run_dir import RunDir
from orchestrator.run.score_identity import pin_revision
from orchestrator.run.score_parity import Finding
from orchestrator.run.stages import rows_of

logger = logging.getLogger("atkd")

PROBE_ROWS = 8


def diagnose_classes(config: RunConfig, run_dir: RunDir, models: Models, engine_factory: EngineFactory) -> list[Finding]:
    """Check a run of classification whose teacher is ready; what is scored here is deleted.

    Raises:
        TeacherFailed: if the teacher cannot be served at all.
    """
    task, run = config.task, run_dir.path
    assert isinstance(task, ClassificationTask)
    counts = read_counts(run / "data")
    findings = [check_class_rows(config, run, counts), check_labels(counts.train_labels, counts.heldout_labels)]
    words = read_asked(run / "data").token_ids if config.teacher.label_words is not None else ()
    if config.teacher.label_words is not None:
        longest = read_asked(run / "data").longest - 1
        findings.append(check_words(config.teacher.label_words.texts(task.labels), words, longest, prompt_window(config, models)))
    is_table = isinstance(config.teacher.model, SoftLabels)
    if isinstance(config.teacher.model, SoftLabels):
        table = load_model(models.ready("teacher")).network.logprobs.detach().double().numpy()
        findings.append(check_table(table, [str(label) for label in task.labels], config.teacher.model.similarity))
    splits = [ExampleFile(rows_of("teacher", split, run)) for split in SPLITS]
    rows = [row for split in splits for row in spread_over_labels(split, PROBE_ROWS // 2)]
    spec = TeacherSpec(
        engine=config.teacher.engine.model_copy(update={"replicas": 1}), model=pin_revision(models.ready("teacher")),
        top_k=config.scores.top_k, longest_row=max(int(split.lengths.max()) for split in splits), label_words=words,
    )  # fmt: skip
    logger.info(
        f"doctor: scores {len(rows)} rows with {spec.engine.kind} ({spec.engine.dtype}), and again with a plain forward pass"
        + ("; as the teacher is before it is calibrated" if config.teacher.calibrate else "")
    )
    with ray_for(config), folder_of_doctor(config, run) as folder:
        stores = score_probe(spec, rows, folder, config.classes, engine_factory, exact=True)
        if isinstance(stores, Finding):
            return [*findings, stores]
        given = (spec.model, words, str(rows_path(folder)), *stores)
        found: ClassParity = measured_on(measure_classes, spec.engine.cpus, on_gpu(spec), *given)
        findings.append(check_export(config, models, run))
    return findings + check_class_scores(found, spec.engine.dtype, config.classes, of_words=bool(words), of_table=is_table)


def spread_over_labels(examples: ExampleFile, count: int) -> list[Example]:
    """Return ``count`` of the rows, or all where there are fewer, of as many labels, and within a label of several lengths."""
    labels = np.array([int(examples[position].targets[0]) for position in range(len(examples))])
    order = np.lexsort((examples.lengths, labels))
    places = np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))
    return [examples[int(order[place])] for place in places]


def check_class_rows(config: RunConfig, run: Path, counts: ClassCounts) -> Finding:
    """Prepare the rows of a run once more and compare them, and say how long they are for the models."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        read_rows(config, Path(folder), Models(config, Path(folder)))
        before, now = (names_of(path / "data") for path in (run, Path(folder)))
    unit = "numbers" if counts.image_shape else "tokens"
    if differing := [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]:
        return Finding(
            "rows", "FAILED", f"prepared twice, {', '.join(sorted(differing))} differ",
            "source, template or tokenizer have changed since, and no scores would be found again: give the run another name "
            "(name=...), or delete its folder",
        )  # fmt: skip
    rows = counts.train_rows + counts.heldout_rows
    numbers = f"{rows} rows, prepared twice, are the same {unit}; {longest_for_models(config, run)}"
    if counts.heldout_rows_in_train:
        numbers += f"; {counts.heldout_rows_in_train} of {counts.heldout_rows} held out are among the training rows"
    if counts.rows_too_long:
        numbers += f"; {counts.rows_too_long} {'cut' if config.data.too_long == 'truncate' else 'dropped'} as too long"
    return Finding("rows", "ok", numbers)


def names_of(data: Path) -> dict[str, str | None]:
    """Return what names the rows of a folder: of each file its content, as labels and as tokens, and the tokenizer."""
    files = {path.name: ExampleFile(path) for path in data.glob("*.arrow")}
    names: dict[str, str | None] = {name: f"{rows.hash} {rows.tokens_hash}" for name, rows in files.items()}
    return {**names, "tokenizer": json.loads((data / "summary.json").read_text())["tokenizer_hash"]}


def longest_for_models(config: RunConfig, run: Path) -> str:
    """Return in words how long the longest row is for each model, and how long it may be."""
    models, parts = Models(config, run), list[str]()
    for role in ROLES:
        if role == "teacher" and (config.teacher.label_words is not None or isinstance(config.teacher.model, SoftLabels)):
            continue  # prompts are spoken of with their words, and a table reads nothing
        longest = max(int(ExampleFile(rows_of(role, split, run)).lengths.max()) for split in SPLITS) - 1
        window = None
        if isinstance(models.side(role).model, PretrainedModel):
            window = window_of_classifier(config_of(models.named(role), f"{role}.model.name"))
        parts.append(f"longest for the {role} {longest}{f' of {window}' if window is not None else ''}")
    return ", ".join(parts)
