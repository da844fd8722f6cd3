"""Configuration schema of adapters, the teacher's engine, the score store and the student loop."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from actors.config.benchmarks import BenchmarksConfig, require_models_that_load
from actors.config.judge import JudgeConfig, require_answers_to_judge
from actors.config.passes import PassesConfig
from actors.config.places import in_object_storage, resolved
from actors.config.workers import CustomResources, NodeLabels, Replicas
from losses.config import AtkdLoss, LossConfig
from losses.section import MayChange, Searchable, Section

DType = Literal["float32", "bfloat16", "float16"]


class SimilarTokens(Section):
    """Teach no predictions but which tokens are like each target: label smoothing over its neighbours, a teacher's control."""

    smoothing: float = Field(default=0.1, gt=0.0, lt=1.0)
    """The mass off the target: of the ``scores.top_k`` tokens whose input embeddings have the largest cosine with its own."""

    temperature: float = Field(default=0.1, gt=0.0)
    """Cosines are divided by it before the soft-max over the neighbours; lower leaves more to the nearest."""


class LoraAdapter(Section):
    """Low-rank adapters on the student's linear layers, merged before export."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter."""

    scale: float = Field(default=32.0, gt=0)
    """LoRA's alpha: the adapter's output is multiplied by scale / rank."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout before the adapter."""

    modules: str | tuple[str, ...] = "all-linear"
    """Names of the layers that get an adapter; ``all-linear`` is every linear layer but the output head."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up and a decay."""

    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate (the paper's: 2e-5)."""

    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Shape of the decay, a scheduler of transformers."""

    warmup_ratio: float = Field(default=0.03, ge=0.0, lt=1.0)
    """Share of all steps during which the rate rises from zero."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay, on matrices only."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""

    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; null for none."""


class TrainConfig(PassesConfig):
    """The student loop: how much, how large, how often."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows; a fraction stops part-way."""

    batch_rows: int = Field(default=32, ge=1)
    """Rows of one optimizer step over all workers and accumulation. The loss depends on this number alone."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, schedule and clipping."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Forward and backward pass; master weights and optimizer state stay in float32."""

    gradient_checkpointing: Annotated[bool, MayChange()] = False
    """Trade compute for activation memory."""

    compile: Annotated[bool, MayChange()] = False
    """Compile the student with torch.compile."""

    sharding: Literal["replicate", "fsdp"] = "replicate"
    """Replicate the student on each worker (DDP), or shard it over them (FSDP2)."""

    first_epoch: Literal["store_order", "permuted"] = "store_order"
    """Read the first epoch in the order in which scores arrive, or permuted by the seed as later epochs are."""

    checkpoint_every_steps: Annotated[int, MayChange()] = Field(default=200, ge=1)
    """Optimizer steps between checkpoints; a killed run repeats at most this many."""

    keep_checkpoints: Annotated[int, MayChange()] = Field(default=2, ge=1)
    """How many of the latest checkpoints stay on disk."""

    max_failures: Annotated[int, MayChange()] = Field(default=2, ge=0)
    """How often the workers are started again after one died."""

    collective_seconds: Annotated[int, MayChange()] = Field(default=1800, ge=1)
    """How long a worker waits for the others in a collective (NCCL's or gloo's timeout) before the training counts as failed."""


class EngineConfig(Section):
    """How the teacher is served for scoring."""

    kind: Literal["vllm", "transformers"] = "vllm"
    """vLLM, or the plain transformers reference behind the same interface."""

    dtype: DType = "bfloat16"
    """Type of the teacher's weights and activations while it scores."""

    replicas: Annotated[Replicas, MayChange()] = 1
    """Number of engines that share the work; ``auto``: as many as the cluster can hold, beside the student if both run at
    one time, and no more than there are shards to score."""

    tensor_parallel: Annotated[int, MayChange()] = Field(default=1, ge=1)
    """GPUs of one engine; they must stand in one node."""

    cpus: Annotated[float, MayChange()] = Field(default=1.0, gt=0)
    """CPUs of each replica, also its number of threads on a machine without GPUs."""

    gpu: Annotated[bool, MayChange()] = False
    """Whether replicas take GPUs (``tensor_parallel`` each)."""

    resources: Annotated[CustomResources, MayChange()] = {}
    """Ray's custom resources of each replica, such as ``{teacher_node: 1}``; only nodes that offer them hold replicas."""

    labels: Annotated[NodeLabels, MayChange()] = {}
    """Labels a node must have to hold replicas, such as ``{role: teacher}``; ``!student`` and ``in(a, b)`` work too."""

    rows_per_call: Annotated[int, MayChange()] = Field(default=64, ge=1)
    """Rows given to the engine at once."""

    gpu_memory_utilization: Annotated[float, MayChange()] = Field(default=0.8, gt=0.0, lt=1.0)
    """Share of the GPU's memory for weights and cache; the rest is for scoring, which vLLM's own profile leaves out."""

    kv_cache_mib: Annotated[int, MayChange()] = Field(default=64, ge=1)
    """Size of the key-value cache on a machine without GPUs."""

    start_seconds: Annotated[float, MayChange()] = Field(default=1800.0, gt=0)
    """How long a replica may take, once it has its devices, until its engine is there: loading, comparing and compiling; and how
    long it may wait for devices."""

    max_restarts: Annotated[int, MayChange()] = Field(default=3, ge=0)
    """How often in a row, without scoring a shard in between, a replica that died is started again."""

    @model_validator(mode="after")
    def _parallel_needs_gpus(self) -> "EngineConfig":
        if self.tensor_parallel > 1 and not self.gpu:
            raise ValueError(f"tensor_parallel {self.tensor_parallel} needs gpu: true; without GPUs 1 would do")
        if self.kind == "transformers" and self.tensor_parallel > 1:
            raise ValueError(f"tensor_parallel {self.tensor_parallel} needs kind: vllm; for transformers 1 would do")
        return self


class ScoresConfig(Section):
    """The score store between teacher and student."""

    top_k: Annotated[int, Searchable("up to the configuration's own, which is what the store holds")] = Field(default=64, ge=1)
    """K: how many of the teacher's most likely tokens, the target aside, are kept for each target."""

    top_mass: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Keep for each target only as many of the K as it takes to hold this share of the teacher's mass off the target
    (0.99): a smaller store, exact where the teacher is sure. Defaults to all K."""

    rows_per_shard: int = Field(default=256, ge=1)
    """Rows of one shard: the unit of work, of waiting and of resuming."""

    compare_rows: Annotated[int, MayChange()] = Field(default=4, ge=0)
    """Rows whose scores are compared with the teacher's plain forward pass in float32 each time it starts, before the first
    shard; 0 goes without. Costs a second load of the teacher, on its own device, or on the CPU where it is on many, and a minute
    at most; where that is too little, fewer rows with short prompts, or none, are compared."""

    root: str | None = None
    """Folder under which stores are kept by their identity, shared between runs: a path, or an address in object storage
    (``s3://bucket/folder``, ``gs://``, ``abfs://``); defaults to ``scores`` beside the runs."""

    path: str | None = None
    """One existing store, by its path or address, to read and nothing else; refused if its identity is another."""

    overlap: Annotated[bool, MayChange()] = True
    """Start the student while the teacher still scores; needs devices for both. With ``rollouts`` the data's rows are scored
    before."""

    wait_seconds: Annotated[float, MayChange()] = Field(default=1800.0, gt=0)
    """How long a student waits for one shard before it gives up."""

    @model_validator(mode="after")
    def _one_place(self) -> "ScoresConfig":
        if self.root and self.path:
            raise ValueError("root and path exclude each other: path names one store, root a folder of stores")
        for place in (self.root, self.path):
            if place and in_object_storage(place):
                resolved(place)  # raises if it is no address
        return self


TaskMeasure = Literal["exact_match", "rouge_l"]
"""What answers to one kind of task are measured by."""


class EvaluateConfig(Section):
    """What is measured on the held-out rows."""

    teacher: Literal["model", "scores"] = "model"
    """Where the teacher's row of the table comes from: the model itself, loaded on one device, with answers; or its scores in the
    store, for a teacher that no single device holds, without answers and texts."""

    batch_rows: Annotated[int, MayChange()] = Field(default=16, ge=1)
    """Rows of one forward pass."""

    generate_rows: int = Field(default=100, ge=0)
    """Held-out rows whose prompts are answered greedily, for exact match and Rouge-L; 0 for none."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer."""

    answer_pattern: str | None = None
    """Regular expression whose first group is the answer to compare, in response and generated text alike (its last
    match counts); defaults to the whole text."""

    by_task: TaskMeasure = "exact_match"
    """What is shown of the answers to each kind of task, where the rows' field ``task`` names one."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations while evaluating."""

    cpus: Annotated[float, MayChange()] = Field(default=1.0, gt=0)
    """CPUs of the evaluator."""

    gpus: Annotated[int, MayChange()] = Field(default=0, ge=0, le=1)
    """GPUs of the evaluator."""

    judge: Annotated[JudgeConfig | None, MayChange()] = None
    """Have a language model judge the generated answers; null for none."""

    benchmarks: Annotated[BenchmarksConfig | None, MayChange()] = None
    """Measure the models by tasks of the lm-evaluation-harness; null for none."""

    @property
    def benchmark_engine(self) -> EngineConfig | None:
        """How models are served for benchmarks: by the type and the devices of the evaluation; None where there are none."""
        if self.benchmarks is None:
            return None
        return EngineConfig(
            kind=self.benchmarks.engine, dtype=self.precision, cpus=self.cpus, gpu=self.gpus > 0,
            rows_per_call=self.benchmarks.batch_rows, kv_cache_mib=self.benchmarks.kv_cache_mib,
        )  # fmt: skip

    @model_validator(mode="after")
    def _something_to_measure(self) -> "EvaluateConfig":
        if self.judge is not None:
            require_answers_to_judge(self.judge, self.generate_rows)
        if self.benchmarks is not None:
            require_models_that_load(self.benchmarks, self.teacher)
        return self

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_has_a_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"answer_pattern {pattern!r} is no regular expression: {error}") from error
        if groups == 0:
            raise ValueError(rf"answer_pattern {pattern!r} has no group for the answer; one like '#### (-?\d+)' would do")
        return pattern


def needs_teacher(loss: LossConfig) -> bool:
    """Whether the loss reads the teacher's scores."""
    return loss.kind != "hard_label"


def needs_complete_store(loss: LossConfig) -> bool:
    """Whether the loss ranks tokens over the whole dataset, so that no step can start before the last shard."""
    return isinstance(loss, AtkdLoss) and loss.scope == "dataset"
