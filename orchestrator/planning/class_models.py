"""The models of a run of classification without their weights, and what its jobs ask of devices.

B rows of a forward pass, T tokens of a row with its label, C classes.
"""

import math
from dataclasses import replace

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from actors.attention import attention_for
from actors.config.networks import ImageCnn, ImageResnet, Network, SoftLabels, TextCnn, TextMlp, TextRnn
from actors.monitors.flops import mean_context
from actors.networks.classifier import SmallClassifier, SmallClassifierConfig, class_logits
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.models.classifiers import has_own_head
from orchestrator.models.models import ROLES, Models, Role, config_of
from orchestrator.planning.class_rows import ClassRows
from orchestrator.planning.jobs import Estimator, Job
from orchestrator.planning.memory import FLOAT, SIZES, Memory, kept_bytes, store_bytes, weights_bytes
from orchestrator.planning.shapes import ModelShape, Passes, Workload

MADE = {
    "autoencoder": "for which an autoencoder is fitted to the training rows; how long that takes is in none of the hours",
    "uniform": "label smoothing", "file": "read from teacher.model.table",
}  # fmt: skip
"""How a table of soft labels comes about, by ``teacher.model.similarity``."""


class ClassEstimator(Estimator):
    """Memory of the jobs of one run of classification and its variants.

    Args:
        config: names the models.
        rows: as student and teacher read them.
    """

    def __init__(self, config: RunConfig, rows: ClassRows) -> None:
        """Raises: ValueError if a pretrained classifier has other labels, or its configuration cannot be read."""
        self._rows, self._untraced = rows, dict[Role, str]()
        super().__init__(config, rows.student, rows.asked, rows.scored)

    def rows(self, job: Job) -> Workload:
        """Return the rows that a training learns from, as its model reads them."""
        return self.read_by(job.role)

    def read_by(self, role: Role) -> Workload:
        """Return the rows as a role's model reads them."""
        return self._rows.teacher if role == "teacher" else self._rows.student

    def shape(self, job: Job) -> ModelShape:
        """Return the shape of what learns."""
        return self.shapes[job.role]

    def replica(self, config: RunConfig, device_bytes: float | None = None) -> Memory:
        """Return what a replica of the teacher takes: a language model's, or weights and a forward pass; of a table itself."""
        if config.teacher.label_words is not None:
            return super().replica(config, device_bytes)
        shape, engine = self.shapes["teacher"], config.teacher.engine
        if isinstance(config.teacher.model, SoftLabels):
            return Memory({"weights": weights_bytes(shape, engine)}, "scoring")
        return _forward_memory(shape, engine.rows_per_call, self.asked.longest, SIZES[engine.dtype], weights_bytes(shape, engine))

    def evaluator(self, config: RunConfig, role: Role) -> Memory:
        """Return what the evaluator of a role's model takes."""
        size, rows = SIZES[config.evaluate.precision], config.evaluate.batch_rows
        shape = self.shapes[role]
        return _forward_memory(shape, rows, self.read_by(role).longest, size, size * shape.weights)

    def store(self, config: RunConfig) -> dict[str, int]:
        """Return the bytes of the stores: of each row its label's log-probability and the C - 1 others', all in float32.

        A teacher that is calibrated has two stores of the held-out rows.
        """
        train, heldout = self.work.rows, self.work.heldout_targets
        twice = 2 if config.teacher.calibrate else 1
        return {
            "train": store_bytes(config.scores, config.classes, train, train, exact=True),
            "heldout": twice * store_bytes(config.scores, config.classes, heldout, heldout, exact=True),
        }

    def remarks(self) -> list[str]:
        """Return what could not be estimated, and what a number here does not say."""
        config, lines = self._config, list(self._rows.remarks)
        if self._rows.words:
            lines.append(f"teacher.label_words: each row is read {config.classes} times, once for each word")
        if isinstance(config.teacher.model, SoftLabels):
            lines.append(
                f"teacher: a table of {config.classes} x {config.classes}, {MADE[config.teacher.model.similarity]}; labels are "
                "looked up in it to score them, which takes no device of its own, and no time here"
            )
        if config.teacher.calibrate:
            lines.append(
                "teacher.calibrate: the held-out rows are scored and stored twice, before and after; both are counted"
            )
        for role in ROLES:
            kind = Models(config, config.run_dir).side(role).model.kind
            if self.shapes[role].token_flops:
                lines.append(
                    f"{role}: {kind} does {self.shapes[role].token_flops:,.0f} operations for each of a row's {self.work.unit}, "
                    "and its hours are those of the operations alone: of a network so small, reading rows and beginning passes "
                    "may take longer"
                )
            if role in self._untraced:
                lines.append(
                    f"{role}: what {self._untraced[role]} keeps for its backward pass cannot be told without its weights, so the "
                    "memory of its training lacks it; a short run would tell"
                )
        return lines

    def _shape_of(self, role: Role) -> ModelShape:
        if role == "teacher" and self._config.teacher.label_words is not None:
            return super()._shape_of(role)
        return class_shape(class_model(self._config, role, self._rows), self.read_by(role))

    def _traced(self, job: Job, passes: Passes, checkpointing: bool) -> int:
        key = (job.role, passes.rows, passes.tokens, job.train.precision, job.train.sharding, checkpointing)
        if key not in self._saved:
            model = class_model(self._config, job.role, self._rows).train()
            if checkpointing and model.supports_gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            in_16_bits = job.train.precision == "bfloat16"
            if in_16_bits and job.train.sharding == "fsdp":  # gathered in 16 bits, and let go: no copy stays
                model, in_16_bits = model.to(torch.bfloat16), False
            found = saved_by_classifier(model, passes.rows, passes.tokens, in_16_bits)
            if found is None:
                self._untraced[job.role] = type(model).__name__
            self._saved[key] = found or 0
        return self._saved[key]


def class_model(config: RunConfig, role: Role, rows: ClassRows) -> PreTrainedModel:
    """Return a role's classifier on torch's meta device; one with a GRU, which looks at its rows, on the CPU.

    Raises:
        ValueError: if a pretrained classifier has other labels, or its configuration can neither be found nor fetched.
    """
    models, task = Models(config, config.run_dir), config.task
    assert isinstance(task, ClassificationTask)
    shape = models.side(role).model
    if isinstance(shape, SoftLabels):
        with torch.device("meta"):
            return SmallClassifier(SmallClassifierConfig(num_labels=config.classes))
    if isinstance(shape, Network):
        settings = SmallClassifierConfig(
            network=shape.model_dump(mode="json"), num_labels=config.classes, image_shape=rows.image_shape,
            vocab_size=rows.student.vocab_size or 0,
        )  # fmt: skip
        with torch.device("cpu" if isinstance(shape, TextRnn) else "meta"):
            return SmallClassifier(settings)
    has_own_head(models, role, task)
    source = models.named(role)
    settings = config_of(source, f"{role}.model.name")
    settings.num_labels = config.classes
    if settings.pad_token_id is None:
        settings.pad_token_id = 0
    eager = "eager" if attention_for(settings, source.attention) == "eager" else None  # the others are fused, as the default
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(
            settings, trust_remote_code=source.trust_remote_code, attn_implementation=eager
        )


def class_shape(model: PreTrainedModel, work: Workload) -> ModelShape:
    """Read the shape off a classifier; its vocabulary are the labels, its head what makes them of a row's state.

    Operations of small networks are counted on a row of mean length, of others they follow from the blocks.
    """
    blocks, classes = _blocks(model), int(model.config.num_labels)
    weights = sum(weight.numel() for weight in model.parameters())
    own = ModelShape(
        weights=weights, trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        vocab_size=classes, hidden_size=classes, intermediate_size=0, layers=len(blocks),
        layer_weights=max(sum(weight.numel() for weight in block.parameters()) for block in blocks), heads=1, kv_size=0,
        tied=False, trains_head=True, largest_matrix=max(weight.numel() for weight in model.parameters()),
    )  # fmt: skip
    if not isinstance(model, SmallClassifier):
        settings = model.config.get_text_config()
        hidden = int(settings.hidden_size)
        return replace(
            own, hidden_size=hidden, intermediate_size=getattr(settings, "intermediate_size", None) or 4 * hidden,
            heads=int(getattr(settings, "num_attention_heads", 1)),
        )  # fmt: skip
    if model.config.network["kind"] == "label_table":
        return replace(own, trains_head=False, token_flops=0.0)
    states = _states(model)
    tokens = max(2, round(mean_context(work.lengths)))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        _read_rows(model.eval(), 1, tokens)
    return replace(own, hidden_size=states, intermediate_size=states, token_flops=counted.get_total_flops() / tokens)


def saved_by_classifier(model: PreTrainedModel, rows: int, tokens: int, bfloat16: bool) -> int | None:
    """Return how many bytes a classifier keeps for its backward pass over rows, weights aside; None where it cannot be told.

    Args:
        model: as ``class_model`` returns it, in training mode.
        rows: B.
        tokens: T, padding and label included.
        bfloat16: whether the pass runs under autocast.
    """
    if isinstance(model, SmallClassifier):
        return kept_bytes(model, lambda: _read_rows(model, rows, tokens), bfloat16)
    device, width = torch.device("meta"), max(1, tokens - 1)
    token_ids = torch.zeros(rows, width, dtype=torch.long, device=device)
    as_made = torch.ones(rows, 1, width, width, dtype=torch.bool, device=device)  # as most models make it of [B, T]
    for mask in (as_made, torch.ones_like(token_ids)):
        try:
            return kept_bytes(model, lambda mask=mask: model(input_ids=token_ids, attention_mask=mask), bfloat16)  # type: ignore[misc]
        except (RuntimeError, TypeError, ValueError):  # a model that looks at its numbers, of which there are none
            continue
    return None


def _read_rows(model: SmallClassifier, rows: int, tokens: int) -> Tensor:
    """Return the logits [B, C] of rows of zeros."""
    token_ids = torch.zeros(rows, tokens, dtype=torch.long, device=model.device)
    labels = torch.arange(1, rows + 1, device=model.device) * tokens - 1
    return class_logits(model, token_ids, torch.ones_like(token_ids), labels)


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the largest list of blocks that a model has; the whole model where it has none."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=len, default=[model])


def _states(model: SmallClassifier) -> int:
    """Return the numbers of the widest state of one token, or of one number of an image."""
    settings: SmallClassifierConfig = model.config
    shape: Network = TypeAdapter(Network).validate_python(settings.network)
    match shape:
        case TextMlp():
            return shape.width
        case TextCnn():
            return max(shape.width, shape.filters)
        case TextRnn():
            return max(shape.width, 6 * shape.hidden)  # three gates in each direction
        case ImageCnn() | ImageResnet():
            return math.ceil(shape.channels / settings.image_shape[0])


def _forward_memory(shape: ModelShape, rows: int, longest: int, size: int, weights: int) -> Memory:
    """Return weights and a forward pass over the longest rows: three states and three inner ones of each token, and logits."""
    tokens = rows * longest
    passing = tokens * (FLOAT * 3 * shape.hidden_size + size * 3 * shape.intermediate_size)
    parts = {"weights": weights, "activations": passing, "scoring": rows * shape.vocab_size * (size + 2 * FLOAT)}
    return Memory(parts, "scoring")
