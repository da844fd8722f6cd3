"""What the doctor finds of a run beside its scores: devices, rows, ends of answers, and the student's export."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import ray

from actors.student.finished_model import ExportDiffers, ExportProof, try_export
from orchestrator.cluster.node_checks import describe
from orchestrator.cluster.node_facts import NodeFacts, read_node_facts
from orchestrator.cluster.ray_session import cluster_address, require_machine
from orchestrator.config.run import RunConfig
from orchestrator.doctor.serving import folder_of_doctor
from orchestrator.models.models import Models
from orchestrator.run.run_dir import Facts
from orchestrator.run.score_parity import Finding
from orchestrator.run.stages import describe_ends, distillation_task, prepare_examples

HASHES = ("train_hash", "heldout_hash", "tokenizer_hash")


def check_devices(config: RunConfig, facts: NodeFacts | None = None) -> Finding:
    """Check whether the machine has the driver, the compilers and the packages that a run needs, before anything is loaded.

    Of a cluster each node with GPUs is asked when the run connects to it, and what is wrong there ends the command.
    """
    if cluster_address():
        return Finding("devices", "ok", "each node with GPUs of the cluster is asked when the run connects to it")
    facts = facts or read_node_facts()
    try:
        require_machine(config, facts)
    except ValueError as error:
        return Finding("devices", "FAILED", describe(facts), str(error))
    return Finding("devices", "ok", describe(facts))


def check_rows(config: RunConfig, run: Path) -> Finding:
    """Prepare the rows of a run once more, and compare token for token: scores are found again by these tokens."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        counts = prepare_examples(config, Models(config, Path(folder)), Path(folder) / "data")
        before, now = (json.loads((path / "data" / "summary.json").read_text()) for path in (run, Path(folder)))
    special = f"; {counts.rows_with_special_tokens} hold special tokens in people's text ({config.data.special_tokens})"
    numbers = f"{counts.rows_read} rows, prepared twice, are the same tokens{special if counts.rows_with_special_tokens else ''}"
    if differing := [name for name in HASHES if before[name] != now[name]]:
        return Finding(
            "rows", "FAILED", f"prepared twice, {', '.join(differing)} differ",
            "source, template or tokenizer have changed since, and no scores would be found again: give the run another name "
            "(name=...), or delete its folder",
        )  # fmt: skip
    return Finding("rows", "ok", numbers)


def check_ends(models: Models, prepared: Facts) -> Finding:
    """Check whether answers end where models can learn that they end."""
    tokenizer = models.tokenizer()
    numbers = describe_ends(prepared["answer_ends"], (), tokenizer)[0]
    turns: dict[str, int] = prepared["counts"]["turn_ends"]
    if unended := turns.get("", 0):
        return Finding(
            "ends", "FAILED", f"{numbers}; {unended} of {sum(turns.values())} answers end in no special token",
            "a model does not learn from them where to stop: set data.format.template to one that ends each turn with one",
        )  # fmt: skip
    return Finding("ends", "ok", numbers)


def check_export(config: RunConfig, models: Models, run: Path) -> Finding:
    """Write the student as a run would, adapters filled with random numbers, and compare what is read again; needs Ray."""
    with folder_of_doctor(config, run) as folder:
        own = str(run / "data" / "train.arrow")  # any rows will do, and responses are not written yet
        task = replace(
            distillation_task(config, run, models, None), examples=own, metrics=str(folder.path),
            output=str(folder.path / "student"), teacher_done=None, mirror=None,
        )  # fmt: skip
        trying = ray.remote(try_export).options(name="doctor", num_cpus=config.workers.cpus)
        try:
            proof: ExportProof = ray.get(trying.remote(task))
        except ExportDiffers as error:
            return Finding("export", "FAILED", str(error), "the run would end so after training")
    untied = f"; {', '.join(proof.untied)} untied from the layer it shares its weight with" if proof.untied else ""
    return Finding(
        "export", "ok",
        f"the student, written in {proof.dtype} and read again, is {proof.kl_of_export:.1e} nats from itself (KL a token), "
        f"{proof.kl_of_merging:.1e} before its weights are rounded{untied}",
    )  # fmt: skip
