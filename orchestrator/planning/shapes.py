"""What configuration and model shapes say before anything starts: weights, sizes, and how many rows of how many tokens.

B rows of a forward pass, T tokens of a row, N targets, V vocabulary, H hidden size.
"""

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors.config.models import TrainConfig
from actors.config.passes import pass_size
from actors.dataloader.sampler import StepSampler, layout_of, steps_in
from actors.examples import ExampleFile
from actors.models import plain_model
from actors.monitors.flops import mean_context
from actors.student.causal_lm import decoder_layers
from orchestrator.config.run import RunConfig
from orchestrator.data.dataset import prepare_data
from orchestrator.data.mixture import source_key
from orchestrator.models.model_checks import RowLimits, require_models_fit, row_limits
from orchestrator.models.models import Models
from orchestrator.run.responses import require_room_for_answers, training_rows

PREPARED, READ_NOW = "the rows that this run has prepared", "the data, read for this plan"
SAID = "what you said of the rows; the longest as long as data.max_tokens allows"
"""Where numbers about rows come from."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory and time depend on of one model."""

    weights: int
    """Weights in all; those that are tied count once."""
    trained: int
    """Weights that learn: all, or the adapters'."""
    vocab_size: int
    """V."""
    hidden_size: int
    """H."""
    intermediate_size: int
    """Width of the feed-forward layers."""
    layers: int
    """Decoder blocks."""
    layer_weights: int
    """Weights of the largest block."""
    heads: int
    """Attention heads."""
    kv_size: int
    """Numbers that one token leaves in the key-value cache of one block."""
    tied: bool
    """Whether input and output embeddings are one matrix."""
    trains_head: bool
    """Whether the output head learns."""
    largest_matrix: int = 0
    """Weights of the largest matrix, where it is neither the head nor in a feed-forward layer."""
    token_flops: float | None = None
    """Operations of a forward pass for one token, where they were counted; None where they follow from the numbers above."""

    @property
    def block_weights(self) -> int:
        """Weights of all blocks, if each is as large as the largest."""
        return self.layers * self.layer_weights

    @property
    def head_weights(self) -> int:
        """V * H."""
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True, slots=True)
class Workload:
    """The rows of a run."""

    lengths: np.ndarray
    """int64 [rows], tokens of each training row, in the order in which they are scored."""
    targets: np.ndarray
    """int64 [rows], targets of each."""
    heldout_tokens: int
    """Tokens of the held-out rows."""
    heldout_targets: int
    """Targets of the held-out rows."""
    longest: int
    """Tokens of the longest row of all."""
    vocab_size: int | None
    """Tokens of the run's tokenizer; None where no tokenizer was looked at."""
    source: str
    """Where these numbers come from, in words."""
    own: "Workload | None" = None
    """The data's own rows, from which models are fine-tuned, where a model writes the responses to them."""
    unit: str = "tokens"
    """What is called a token here: of images each number is one."""

    @property
    def rows(self) -> int:
        """Training rows."""
        return len(self.lengths)

    @property
    def train_tokens(self) -> int:
        """Tokens of the training rows."""
        return int(self.lengths.sum())

    @property
    def train_targets(self) -> int:
        """Targets of the training rows."""
        return int(self.targets.sum())


@dataclass(frozen=True, slots=True)
class Passes:
    """The forward passes of one training, as one worker meets them."""

    rows: int
    """B of the largest pass."""
    tokens: int
    """T of the largest pass, padding included."""
    targets: int
    """Most targets of one pass."""
    accumulates: bool
    """Whether a step has several passes."""
    padding: float
    """Tokens that are computed for each token that is there; at least 1."""
    context: float
    """Tokens over which attention is computed for a token, on average: of its own row, or of all that are packed with it."""


def read_workload(config: RunConfig) -> Workload:
    """Return the rows of a run: those its folder holds, or else the data itself, read now.

    Raises:
        ValueError: if the data is on the hub, where reading it is no matter of seconds, and nothing is known of it yet; or if a
            model cannot take the rows.
    """
    if _was_prepared(config):
        return _counted(config, config.run_dir, PREPARED)
    require_rows_here(config, "say --rows, --row-tokens and --row-targets, or run the command prepare first")
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        models = Models(config, Path(folder))
        prepare_data(config.data, models.tokenizer_for, Path(folder) / "data")
        return _counted(config, Path(folder), READ_NOW)


def require_rows_here(config: RunConfig, remedy: str) -> None:
    """Raise if rows are on the hub, where reading them is no matter of seconds; ``remedy`` says what would do."""
    for key, share in config.data.training_sources.items():
        if share.source.kind == "hub":
            raise ValueError(
                f"{source_key(key)}.name {share.source.name!r} is on the hub and this run has not prepared it, so its rows are "
                f"not known; {remedy}"
            )


def workload_of(config: RunConfig, rows: int, row_tokens: float, row_targets: float) -> Workload:
    """Return rows of which the user says how many there are, and how long they are on average.

    Raises:
        ValueError: if a row has more tokens than ``data.max_tokens``, or not more tokens than targets.
    """
    require_said(config, rows, row_tokens)
    if not 1 <= row_targets < row_tokens:
        raise ValueError(
            f"--row-targets {row_targets:g} must be at least 1 and below --row-tokens {row_tokens:g}: nothing predicts the "
            f"first token; {max(1.0, row_tokens / 2):g} would do"
        )
    require_models_fit(config, Models(config, config.run_dir), RowLimits(math.ceil(row_tokens), 0, -1))
    heldout = config.data.planned_heldout_rows
    said = Workload(
        lengths=spread_evenly(rows, row_tokens),
        targets=spread_evenly(rows, row_targets),
        heldout_tokens=round(heldout * row_tokens),
        heldout_targets=round(heldout * row_targets),
        longest=config.data.max_tokens,
        vocab_size=None,
        source=SAID,
    )
    return with_responses(config, said, said.lengths - said.targets, longest_prompt=config.data.max_tokens)


def require_said(config: RunConfig, rows: int, row_tokens: float) -> None:
    """Raise if there are no rows, or they are longer than the configuration lets them be."""
    if rows < 1:
        raise ValueError(f"--rows {rows} is no number of training rows; 1 is the least")
    if not 2 <= row_tokens <= config.data.max_tokens:
        raise ValueError(
            f"--row-tokens {row_tokens:g} must lie between 2 and data.max_tokens {config.data.max_tokens}, since longer rows "
            f"are dropped or cut; data.max_tokens={math.ceil(row_tokens)} would keep them"
        )


def with_responses(config: RunConfig, work: Workload, prompts: np.ndarray, longest_prompt: int) -> Workload:
    """Return the data's own rows as they are once their responses are written, each as long as it may become.

    ``prompts``, int64 [rows], are the tokens of their prompts. Where nobody writes, the rows are returned as they are.
    """
    if config.rollouts is not None:
        work = replace(work, longest=max(work.longest, longest_prompt + config.rollouts.max_new_tokens))
    if (responses := config.responses) is None:
        return work
    lengths = np.tile(prompts + responses.max_new_tokens, responses.samples_per_prompt)
    return replace(
        work,
        lengths=lengths,
        targets=np.full(len(lengths), responses.max_new_tokens),
        own=work,
        longest=max(work.longest, longest_prompt + responses.max_new_tokens),
        source=f"{work.source}; responses as long as responses.max_new_tokens {responses.max_new_tokens} allows",
    )


def spread_evenly(rows: int, mean: float) -> np.ndarray:
    """Return int64 [rows] whose mean is as near to ``mean`` as whole numbers allow."""
    edges: np.ndarray = np.round(np.arange(rows + 1) * mean).astype(np.int64)
    return np.diff(edges)


def _was_prepared(config: RunConfig) -> bool:
    """Whether the run's folder holds the rows of this very data."""
    settings, now = prepared_settings(config), config.model_dump(mode="json")
    return bool(settings) and all(settings.get(section) == now[section] for section in ("data", "tokenizer", "responses"))


def prepared_settings(config: RunConfig) -> dict[str, Any]:
    """Return the configuration, dumped, by which the run's folder was prepared; nothing where it was not."""
    folder = config.run_dir
    if not (folder / "stages" / "prepare.json").is_file() or not (folder / "config.yaml").is_file():
        return {}
    settings: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return settings


def _counted(config: RunConfig, folder: Path, source: str) -> Workload:
    require_models_fit(config, Models(config, folder), row_limits(config, folder / "data"))
    train, heldout = (ExampleFile(folder / "data" / f"{split}.arrow") for split in ("train", "heldout"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    counted = Workload(
        lengths=train.lengths,
        targets=train.target_counts,
        heldout_tokens=heldout.tokens,
        heldout_targets=int(heldout.target_counts.sum()),
        longest=max(int(train.lengths.max()), int(heldout.lengths.max())),
        vocab_size=len(tokenizer),
        source=source,
    )
    if config.responses is not None and (folder / "stages" / "respond.json").is_file():
        written = ExampleFile(training_rows(config, folder))
        longest = max(int(written.lengths.max()), counted.longest)
        return replace(counted, lengths=written.lengths, targets=written.target_counts, longest=longest, own=counted)
    prompts = np.array([len(train[row].last_prompt) for row in range(len(train))])
    require_room_for_answers(config, Models(config, folder), int(prompts.max()))
    return with_responses(config, counted, prompts, int(prompts.max()))


def passes_of(work: Workload, train: TrainConfig, workers: int, seed: int) -> Passes:
    """Return the forward passes of a training, cut as the student's loop cuts them, for the worker with the longest rows.

    Packed rows count as attention with a mask computes them, over the whole pass; flash attention takes each by itself.
    """
    sampler = StepSampler(work.rows, train.batch_rows, seed, train.first_epoch == "store_order")
    largest, most_targets, computed, most_passes = (1, 1), 1, 0, 1
    steps = steps_in(work.rows, train.batch_rows, train.epochs)
    there, packs = 0, []
    for step in range(1, steps + 1):
        positions = sampler.positions(step)
        mine = [positions[rows] for rows in layout_of(work.lengths[positions], workers, train)[0] if rows]
        for rows in mine:
            together = int(work.lengths[rows].sum())
            size = (1, together) if train.packing else (len(rows), int(work.lengths[rows].max()))
            computed, there = computed + size[0] * size[1], there + together
            largest = max(largest, size, key=lambda one: one[0] * one[1])
            most_targets = max(most_targets, int(work.targets[rows].sum()))
            packs.append(together)
        most_passes = max(most_passes, len(mine))
    stretch = work.longest / int(work.lengths.max())  # above 1 where the user named a mean, and the longest may be longer
    tokens, targets = math.ceil(largest[1] * stretch), math.ceil(most_targets * stretch)
    if train.packing:  # a pass is no longer than its budget, or than its only row
        tokens = min(tokens, max(work.longest, pass_size(train)[1]))
        targets = min(targets, tokens)
    return Passes(
        rows=largest[0],
        tokens=tokens,
        targets=targets,
        accumulates=most_passes > 1,
        padding=computed / there,
        context=mean_context(np.array(packs) if train.packing else work.lengths),
    )


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Read the shape off a model, wherever it is."""
    plain = plain_model(model)
    settings, head = plain.config.get_text_config(), plain.get_output_embeddings()
    heads = settings.num_attention_heads
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return ModelShape(
        weights=sum(weight.numel() for weight in model.parameters()),
        trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        vocab_size=len(head.weight),
        hidden_size=head.weight.shape[1],
        intermediate_size=getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size,
        layers=len(decoder_layers(model)),
        layer_weights=max(sum(weight.numel() for weight in layer.parameters()) for layer in decoder_layers(model)),
        heads=heads,
        kv_size=2 * (getattr(settings, "num_key_value_heads", None) or heads) * head_size,
        tied=head.weight is plain.get_input_embeddings().weight,
        trains_head=head.weight.requires_grad,
    )
