"""What a run shows while it runs: numbers that every node's Ray exports to Prometheus.

The only file that knows ``ray.util.metrics``. Ray puts ``ray_`` before each name, and ``_total`` behind that of a counter. To set
one takes microseconds and waits for nothing; where no Ray is connected nothing is shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ray
from ray.util.metrics import Counter, Gauge

TAGS = ("run", "stage")
"""Of every metric: the name of the run, and what it does: ``train``, ``finetune_teacher``, ``trial_0003``, ``score_heldout``."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One metric."""

    name: str
    """Begins with ``atkd_`` and ends in the unit, if it has one."""
    description: str
    """What it says."""
    kind: Literal["gauge", "counter"] = "gauge"
    """A gauge has the last value; a counter is what was added since its process began, and is read as a rate."""
    tags: tuple[str, ...] = TAGS
    """What tells its series apart."""

    @property
    def exported_name(self) -> str:
        """The name under which Prometheus knows it."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


STUDENT = {
    "step": Shown("atkd_student_step", "Optimizer steps done"),
    "total_steps": Shown("atkd_student_planned_steps", "Optimizer steps of the whole training"),
    "epoch": Shown("atkd_student_epoch", "Passes over the training rows"),
    "loss": Shown("atkd_student_loss_nats", "Loss of the step"),
    "cross_entropy": Shown("atkd_student_cross_entropy_nats", "Cross entropy with the data, mean over the step's targets"),
    "divergence": Shown("atkd_student_divergence_nats", "Divergence from the teacher, mean over the step's targets"),
    "target_term": Shown("atkd_student_target_term_nats", "Target part of the divergence, mean over the step's targets"),
    "diversity_term": Shown("atkd_student_diversity_term_nats", "Diversity part of the divergence, mean over the step's targets"),
    "easy_share": Shown("atkd_student_easy_share", "Share of the step's targets that is easy"),
    "easy_border": Shown("atkd_student_easy_border", "Highest UNC of the step's easy targets"),
    "easy_loss": Shown("atkd_student_easy_loss_nats", "Part of the loss that easy targets make"),
    "hard_loss": Shown("atkd_student_hard_loss_nats", "Part of the loss that hard targets make"),
    "easy_diversity": Shown("atkd_student_easy_diversity_nats", "Diversity part, mean over easy targets"),
    "hard_target": Shown("atkd_student_hard_target_nats", "Target part, mean over hard targets"),
    "hard_diversity": Shown("atkd_student_hard_diversity_nats", "Diversity part, mean over hard targets"),
    "gradient_norm": Shown("atkd_student_gradient_norm", "Norm of the gradient before it is clipped"),
    "learning_rate": Shown("atkd_student_learning_rate", "Learning rate of the step"),
    "tokens_per_second": Shown(
        "atkd_student_tokens_per_second", "Tokens of the step, prompts included, over its time without waiting"
    ),
    "tokens": Shown("atkd_student_tokens", "Tokens learnt from, prompts included", "counter"),
    "waited_seconds": Shown("atkd_student_waited_seconds", "Time spent waiting for scores", "counter"),
}
"""What a student shows, by the names of its lines in ``metrics/``. A loss shows those it has."""

GPU = {
    "mfu": Shown("atkd_student_mfu", "Share of the GPUs' bfloat16 speed that the model's own operations take"),
    "gpu_memory_bytes": Shown("atkd_student_gpu_memory_bytes", "Most memory that tensors held on the first worker's GPU"),
}
"""What a student on GPUs shows beside it; the first only of GPUs whose speed is known."""

TEACHER = {
    "shards_done": Shown("atkd_teacher_shards_done", "Shards of the store that are there"),
    "shards_total": Shown("atkd_teacher_shards_planned", "Shards of the complete store"),
    "tokens_per_second": Shown(
        "atkd_teacher_tokens_per_second", "Tokens scored by this run since the stage began, prompts included, over its time"
    ),
    "tokens": Shown("atkd_teacher_tokens", "Tokens scored by this run, prompts included", "counter"),
    "in_flight": Shown("atkd_teacher_shards_in_flight", "Shards that a replica holds", tags=(*TAGS, "replica")),
    "held_mass": Shown("atkd_teacher_held_mass", "Mass on the target and the tokens kept, mean over the last shard's targets"),
    "uncertainty": Shown("atkd_teacher_uncertainty", "UNC, the mass off the target, mean over the last shard's targets"),
}
"""What a teacher's pool shows."""

SERVICE = {
    "waiting": Shown("atkd_service_rows_waiting", "Rows asked for that no replica has taken yet"),
    "held": Shown("atkd_service_rows_held", "Rows that replicas have in hand"),
    "replicas": Shown("atkd_service_replicas", "Replicas in service"),
    "scored": Shown("atkd_service_rows_scored", "Rows scored on demand", "counter"),
}
"""What the router of scores on demand shows."""


class StudentMetrics:
    """Shows the steps of one training."""

    def __init__(self, run: str, stage: str) -> None:
        self._board = _Board(STUDENT | GPU)
        self._tags = {"run": run, "stage": stage}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show one step."""
        self._board.show({"step": step, **values}, self._tags)
        if "easy_loss" in values:
            self._board.show({"hard_loss": values["loss"] - values["easy_loss"]}, self._tags)

    def close(self) -> None:
        """Leave the last step standing until the process ends."""


class TeacherMetrics:
    """Shows the scoring of one run."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._board = _Board(TEACHER)
        self._stage = "score"
        self._replicas: set[int] = set()

    def begin(self, split: str) -> None:
        """Set the split that all numbers are of from now on."""
        self._stage = f"score_{split}"

    def progress(self, shards_done: int, shards_total: int, tokens_per_second: float) -> None:
        """Show how far the store has come."""
        progress = {"shards_done": shards_done, "shards_total": shards_total, "tokens_per_second": tokens_per_second}
        self._board.show(progress, self._tags)

    def scored(self, tokens: int, held_mass: float, uncertainty: float) -> None:
        """Show one more shard: its tokens, and the means over its targets."""
        self._board.show({"tokens": tokens, "held_mass": held_mass, "uncertainty": uncertainty}, self._tags)

    def in_flight(self, shards: Mapping[int, int]) -> None:
        """Show how many shards each replica holds, by its number; one that is gone holds none."""
        self._replicas |= shards.keys()
        for replica in sorted(self._replicas):
            self._board.show({"in_flight": shards.get(replica, 0)}, {**self._tags, "replica": str(replica)})

    @property
    def _tags(self) -> dict[str, str]:
        return {"run": self.run, "stage": self._stage}


class ServiceMetrics:
    """Shows the router of scores on demand."""

    def __init__(self, run: str) -> None:
        self._board = _Board(SERVICE)
        self._tags = {"run": run, "stage": "serve"}

    def show(self, waiting: int, held: int, replicas: int) -> None:
        """Show how many rows wait and are in hand, and how many replicas there are."""
        self._board.show({"waiting": waiting, "held": held, "replicas": replicas}, self._tags)

    def scored(self, rows: int) -> None:
        """Show that so many more rows were scored."""
        self._board.show({"scored": rows}, self._tags)


class _Board:
    """The metrics of a table, in this process; none where no Ray is connected."""

    def __init__(self, table: Mapping[str, Shown]) -> None:
        self._metrics = {key: _make(shown) for key, shown in table.items()} if ray.is_initialized() else {}

    def show(self, values: Mapping[str, float], tags: dict[str, str]) -> None:
        """Set the gauges and add to the counters that the values speak of; values without a metric are left out."""
        for key, value in values.items():
            metric = self._metrics.get(key)
            if isinstance(metric, Gauge):
                metric.set(value, tags=tags)
            elif metric is not None and value > 0:  # Ray's counters refuse to add nothing
                metric.inc(value, tags=tags)


def _make(shown: Shown) -> Gauge | Counter:
    kinds = {"gauge": Gauge, "counter": Counter}
    return kinds[shown.kind](shown.name, description=shown.description, tag_keys=shown.tags)
