"""The stage in which the student is cut from the teacher, as the teacher is once it is ready: fine-tuned, if it is."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.attention import exact
from actors.config.model_kinds import CutModel
from actors.examples import ExampleFile
from actors.files import whole_folder, write_atomically
from actors.format import plural
from actors.model_source import ModelSource
from actors.models import load_model, save_model
from actors.records import Example
from actors.student.finished_model import every_token, logprobs_of, mean_kl
from orchestrator.models.block_influence import block_influences
from orchestrator.models.layer_cut import cut_model, layers_of, most_influential, named_layers, renumber, require_same_blocks
from orchestrator.models.model_files import stored_dtype
from orchestrator.models.models import Models
from orchestrator.run.run_dir import Facts, RunDir
from orchestrator.run.score_identity import pin_revision

logger = logging.getLogger("atkd")

RECORD = "cut.json"
"""Beside the student's weights: what it was cut from, and how."""
PROOF_TOKENS = 64
TOLERANCE = 1e-3
"""Nats of KL: the same weights read again gave 0; a block at a wrong place gave whole nats."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What a student was cut from, and how."""

    teacher: str
    """Folder or hub name."""
    commit: str | None
    """The teacher's on the hub; None for a folder."""
    layers: tuple[int, ...]
    """The teacher's layers that were kept, counted from 0."""
    of: int
    """How many layers the teacher has."""
    choose: str
    """How they were chosen: ``named``, or by the key's value."""
    influences: tuple[float, ...] | None
    """One minus the mean cosine of each layer's input and output; None where it was not measured."""

    def line(self) -> str:
        """Return it in words."""
        kept = f"student: layers {', '.join(map(str, self.layers))} of the {self.of} of {self.teacher} ({self.choose})"
        if self.influences is None:
            return kept
        return f"{kept}; influence of each layer: {', '.join(f'{influence:.3f}' for influence in self.influences)}"


def require_can_be_cut(models: Models) -> None:
    """Raise if the student is to be cut from a pretrained teacher and cannot be; the teacher's weights are not needed.

    Raises:
        ValueError: naming the key or the teacher's class, and what would do.
    """
    cut = models.config.student.model
    if cut.kind == "cut" and not models.made_for_the_rows("teacher"):
        settings = models.settings("teacher")
        require_same_blocks(settings, named_layers(cut, layers_of(settings)), models.named("teacher").trust_remote_code)


def cut_student(run_dir: RunDir, models: Models) -> Facts:
    """Cut the student from the teacher, unless that is done; return which layers it has.

    The teacher is loaded once, on the CPU of this process and in the type of its stored weights.

    Raises:
        ValueError: if the teacher cannot be loaded, or cannot be cut so.
    """
    folder = Path(models.begun("student").name)
    if not folder.exists():
        cut = models.config.student.model
        assert isinstance(cut, CutModel), "the stage is left out for other students"
        examples = ExampleFile(run_dir.path / "data" / "train.arrow")
        write_cut(cut, models.ready("teacher"), models.tokenizer_folder, examples, folder)
    record = read_record(folder)
    logger.info(record.line())
    return asdict(record)


def read_record(folder: Path) -> Cut:
    """Return what the record beside a cut student says."""
    content = json.loads((folder / RECORD).read_text())
    lists = {name: tuple(content[name]) for name in ("layers", "influences") if content[name] is not None}
    return Cut(**{**content, **lists})


def write_cut(cut: CutModel, teacher: ModelSource, tokenizer: Path, examples: ExampleFile, folder: Path) -> None:
    """Write the folder of a student that is cut from a teacher: whole, and only if it predicts what the kept layers do.

    Args:
        cut: which layers are kept.
        teacher: to cut from.
        tokenizer: folder of the tokenizer that is copied beside the weights.
        examples: the training rows, of which the first are measured on and the proof is made of.
        folder: to write.

    Raises:
        ValueError: if the teacher cannot be loaded, or what was written predicts something else.
    """
    teacher, dtype = exact(teacher), getattr(torch, stored_dtype(teacher))
    try:
        teacher = pin_revision(teacher)
        model = load_model(teacher, dtype)
    except OSError as error:
        raise ValueError(
            f"student.model.kind is cut, and the teacher {teacher.name!r} cannot be loaded: {error}; "
            "teacher.model.name=/a/folder would do"
        ) from error
    record = _chosen(cut, teacher, model, examples)
    require_same_blocks(model.config, record.layers, teacher.trust_remote_code)
    cut_model(model, record.layers)
    beginning = every_token(_tokens(examples[0])[None, :PROOF_TOKENS])
    expected = logprobs_of(model, beginning)
    renumber(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as unproved:
        save_model(model, tokenizer, unproved)
        again = ModelSource(str(unproved), None, teacher.trust_remote_code, teacher.attention)
        _require_near(expected, logprobs_of(load_model(again, dtype), beginning), type(model).__name__)
        write_atomically(unproved / RECORD, json.dumps(asdict(record), indent=1).encode())


def _chosen(cut: CutModel, teacher: ModelSource, model: PreTrainedModel, examples: ExampleFile) -> Cut:
    """Choose the layers that are kept; the influences are measured only where they decide."""
    layers = layers_of(model.config)
    kept = named_layers(cut, layers)
    if cut.choose != "least_influence":
        how = (cut.choose or "evenly") if isinstance(cut.layers, int) else "named"
        return Cut(teacher.name, teacher.revision, kept, layers, how, None)
    rows = min(cut.influence_rows, len(examples))
    logger.info(f"student: the influence of the teacher's {layers} layers is measured on {plural(rows, 'row')}")
    influences = block_influences(model, (_tokens(examples[row]) for row in range(rows)))
    return Cut(
        teacher.name, teacher.revision, most_influential(influences, cut.count), layers, cut.choose, tuple(influences)
    )  # fmt: skip


def _tokens(example: Example) -> Tensor:
    return torch.from_numpy(example.token_ids.astype(np.int64))


def _require_near(expected: Tensor, found: Tensor, name: str) -> None:
    kl = mean_kl(expected, found)
    if not kl <= TOLERANCE:
        raise ValueError(
            f"student.model.kind is cut, and the teacher, a {name}, cannot be: read again, the student is {kl:.2e} nats from "
            f"the layers that were kept (may {TOLERANCE:g}), so what they do depends on their places; "
            "student.model.kind=pretrained or scratch would do"
        )
