"""The end of a training: the student as an ordinary Hugging Face folder, proved to be the student that was trained.

T tokens, V vocabulary. Logarithms are natural.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.attention import exact
from actors.config.models import TrainConfig
from actors.dataloader.class_rows import row_logits
from actors.dataloader.collator import MicroBatch, collate, every_token
from actors.dataloader.scored_rows import FileRows
from actors.evaluation.answer_ends import stop_as_evaluated
from actors.examples import ExampleFile
from actors.files import whole_folder, write_atomically
from actors.lora import merge_adapters, shared_with_adapters
from actors.models import is_classifier, load_model, save_model
from actors.rounding import generator_of, rounded
from actors.student.causal_lm import prepare_model, student_of
from actors.student.checkpoint import whole_weights
from actors.student.model import undistributed
from actors.student.ranks import Worker
from actors.student.task import TrainingTask
from losses.terms import categorical_kl

PROOF_TOKENS = 64
TOLERANCE = 1e-4  # nats of KL, averaged over positions; float32 on one device gave 1e-10, a head merged wrongly 0.28
TRIED_ADAPTERS = 0.05  # standard deviation of adapters that stand for trained ones
ROUNDED_TOLERANCE = 2e-2  # where the student can be computed in 16 bits alone


class ExportDiffers(ValueError):
    """A finished model, written and loaded again, is not the one that was trained."""


@dataclass(frozen=True, slots=True)
class ExportProof:
    """How near the written model is to the trained one, on the first tokens of a row."""

    tokens: int
    """Positions compared."""
    dtype: str
    """Type of the stored weights."""
    kl_of_merging: float
    """Mean KL(trained || written) in nats, before the weights take their stored type."""
    kl_of_export: float
    """The same after it: what the stored type costs."""
    untied: tuple[str, ...]
    """Layers whose weight was shared with another and is not any more, since only one of the two had an adapter."""


def write_finished_model(student: nn.Module, task: TrainingTask, folder: Path, worker: Worker) -> None:
    """Write the model as an ordinary folder, adapters merged, in the type the task names; all workers call it together.

    Raises:
        ExportDiffers: on the first worker, with nothing left in ``folder``, if the folder does not hold what was trained.
    """
    rows = rows_to_prove(task)
    trained = trained_logprobs(student, task, rows, worker)
    weights = whole_weights(student)
    if worker.rank > 0:
        return
    source = exact(task.model)
    model = prepare_model(source, task.lora, TrainConfig())
    student_of(model, task.loss).load_state_dict(weights)
    untied = shared_with_adapters(model) if task.lora else []
    plain = merge_adapters(model) if task.lora else model
    if not task.model.classes:
        stop_as_evaluated(plain, Path(task.tokenizer))
    tolerance = ROUNDED_TOLERANCE if source != task.model else TOLERANCE
    merged = logprobs_of(plain, rows)
    kl_of_merging = require_near(trained, merged, tolerance, "with its adapters merged" if task.lora else "gathered")

    dtype = getattr(torch, task.dtype)
    generator = generator_of(task.seed)
    for weight in plain.parameters():  # and no buffers: those that are not stored, as rotary frequencies, are made anew
        weight.data = rounded(weight.data, dtype, generator).float()
    expected = logprobs_of(plain, rows)
    with whole_folder(folder) as unproved:
        save_model(plain.to(dtype), tokenizer if (tokenizer := Path(task.tokenizer)).exists() else None, unproved)
        del plain, model
        written = logprobs_of(load_model(replace(source, name=str(unproved), revision=None)), rows)
        require_near(expected, written, TOLERANCE, f"written in {task.dtype} and loaded again")
        proof = ExportProof(len(rows.targets), task.dtype, kl_of_merging, mean_kl(trained, written), tuple(untied))
        write_atomically(proof_path(task), json.dumps(asdict(proof), indent=1).encode())


def try_export(task: TrainingTask) -> ExportProof:
    """Write the student, its adapters filled with random numbers, as it would be written after training; return the proof.

    Raises:
        ExportDiffers: if the folder does not hold what would have been trained.
    """
    assert task.output is not None, "it is written somewhere"
    worker = Worker.here(task.threads, gpu=False)
    model = prepare_model(task.model, task.lora, TrainConfig())
    if task.lora is not None:
        torch.manual_seed(task.seed)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = TRIED_ADAPTERS * torch.randn_like(weight)
    write_finished_model(student_of(model, task.loss), task, Path(task.output), worker)
    proof = read_proof(proof_path(task))
    assert proof is not None, "it was written a moment ago"
    return proof


def proof_path(task: TrainingTask) -> Path:
    """Return the file that holds the proof of a finished model."""
    return Path(task.metrics) / f"{task.name}_export.json"


def read_proof(path: Path) -> ExportProof | None:
    """Return the proof that a file holds; None where there is none."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return ExportProof(**{**content, "untied": tuple(content["untied"])})


@torch.no_grad()
def trained_logprobs(student: nn.Module, task: TrainingTask, rows: MicroBatch, worker: Worker) -> Tensor:
    """Return float64 [T, V], what the student predicts as it stands on its workers, through the loop's own way to logits."""
    module = undistributed(student)
    was_training = module.training
    module.eval()
    in_16_bits = exact(task.model) != task.model
    with torch.autocast(worker.device.type, torch.bfloat16, enabled=in_16_bits):
        (logits,) = module(rows.to(worker.device), None)
    module.train(was_training)
    return logits.double().log_softmax(dim=-1).cpu()


@torch.no_grad()
def logprobs_of(model: PreTrainedModel, rows: MicroBatch) -> Tensor:
    """Return float64 [T, V], what a plain model predicts at the targets of some rows."""
    model.eval()
    if is_classifier(model):
        logits = row_logits(model, rows)
    else:
        logits = model(input_ids=rows.token_ids.to(model.device), use_cache=False).logits.flatten(0, 1)[rows.predicting]
    return logits.double().log_softmax(dim=-1).cpu()


def require_near(trained: Tensor, found: Tensor, tolerance: float, what: str) -> float:
    """Return the mean KL in nats of two sets of distributions [T, V].

    Raises:
        ExportDiffers: if it exceeds the tolerance, or is no number.
    """
    kl = mean_kl(trained, found)
    if not kl <= tolerance:
        raise ExportDiffers(
            f"the finished model, {what}, is not the one that was trained: on {len(trained)} tokens their distributions are "
            f"{kl:.2e} nats apart (may {tolerance:g}), so it is not kept; the checkpoints are. export.dtype=float32 would do "
            "where the stored type overflows, student.lora.modules=all-linear where an adapter cannot be merged"
        )
    return kl


def mean_kl(trained: Tensor, found: Tensor) -> float:
    """Return the mean over positions of KL(trained || found), both float64 [T, V] log-probabilities."""
    return float(categorical_kl(trained, found).mean())


def rows_to_prove(task: TrainingTask) -> MicroBatch:
    """Return the first rows of a classifier's training, or the first of a language model, asked for at each of its tokens."""
    examples = ExampleFile(Path(task.examples))
    if task.model.classes:
        positions = np.arange(min(PROOF_TOKENS, len(examples)))
        return collate(FileRows(examples, None, 0, positions), range(len(positions)), task.model.classes)
    return every_token(torch.from_numpy(examples[0].token_ids[:PROOF_TOKENS].astype(np.int64))[None])
