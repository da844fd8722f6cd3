"""The measurement of a minute behind ``plan --probe``: a replica scores some rows, and a worker learns from them.

Rows are as long as the run's, of random tokens; models made from scratch have random weights. Neither changes how long it takes.
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.config.model_kinds import ScratchModel
from actors.config.models import TrainConfig, needs_teacher
from actors.config.places import resolved
from actors.dataloader.sampler import StepSampler
from actors.dataloader.scored_rows import StoredRows
from actors.dataloader.step_loader import StepLoader
from actors.dataloader.step_weights import StepWeights
from actors.engines.base import EngineFactory, TeacherSpec
from actors.engines.build import build_engine
from actors.environment import task_environment
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.models import save_model, scratch_model
from actors.records import Example, example_key
from actors.score_store.store import ScoreStore
from actors.student.causal_lm import make_student
from actors.student.loop import accumulate_gradients
from actors.student.model import undistributed
from actors.student.optimizer import clip_gradients, make_optimizer
from actors.student.ranks import Worker
from actors.teacher.pool import TeacherPool
from losses.loss_state import LossState
from orchestrator.cluster.ray_session import ray_for
from orchestrator.cluster.run_copies import PassingFolder, passing_folder
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models, Role
from orchestrator.planning.jobs import Estimator
from orchestrator.planning.meta_models import meta_model, plain_tokenizer, scratch_vocab_size
from orchestrator.planning.shapes import Workload
from orchestrator.planning.throughput import Rates

logger = logging.getLogger("atkd")

SCORING_SECONDS = 12.0
"""How long scoring should take, at the assumed speed."""
TRAINING_SECONDS = 10.0
"""How long steps are timed."""
FEWEST_ROWS, MOST_ROWS = 32, 2048
SHARDS = 8
"""The first is not timed: what starts and compiles does so there."""


@dataclass(frozen=True, slots=True)
class _Student:
    """What the timed worker is told."""

    model: ModelSource
    config: RunConfig
    train: TrainConfig
    examples: str
    store: str | None
    seconds: float


def probe(
    config: RunConfig,
    estimator: Estimator,
    assumed: Rates,
    engine_factory: EngineFactory = build_engine,
) -> Rates:
    """Measure one replica and one worker on what the configuration gives them, in the run's Ray.

    A worker takes its share of a batch; the exchange of gradients with others is not measured.

    Raises:
        TeacherFailed: if the teacher cannot be served.
        ValueError: if the cluster cannot hold a replica or a worker.
    """
    work = estimator.work
    rows = int(np.clip(SCORING_SECONDS * assumed.scoring * work.rows / work.train_tokens, FEWEST_ROWS, MOST_ROWS))
    vocab_sizes = [shape.vocab_size for shape in estimator.shapes.values()]
    examples = random_rows(work, rows, min(vocab_sizes))
    output = config.run_dir.parent
    output.mkdir(parents=True, exist_ok=True)
    address = resolved(config.output) if config.mirror is not None else None
    with ray_for(config), passing_folder(output, address, "plan-") as folder:
        write_examples(folder.path / "rows.arrow", examples)
        logger.info(f"probe: one replica scores {rows} rows, {sum(len(example.token_ids) for example in examples):,} tokens")
        scoring = measure_scoring(config, estimator, folder, engine_factory)
        logger.info(f"probe: {scoring:,.0f} tokens/s; one worker learns from them")
        training = measure_training(config, work, folder)
        logger.info(f"probe: {training:,.0f} tokens/s")
    return Rates(scoring, training, "measured now on one replica and one worker")


def random_rows(work: Workload, rows: int, vocab_size: int) -> list[Example]:
    """Return rows of random tokens, as long as those of the run, with as many targets at their ends."""
    generator = np.random.default_rng(0)
    places = np.linspace(0, work.rows - 1, rows).round().astype(int)
    examples = []
    for row, place in enumerate(places):
        token_ids = generator.integers(0, vocab_size, work.lengths[place]).astype(np.int32)
        loss_mask = np.arange(len(token_ids)) >= len(token_ids) - min(work.targets[place], len(token_ids) - 1)
        examples.append(Example(token_ids, loss_mask, example_key(token_ids, loss_mask), row))
    return examples


def measure_scoring(
    config: RunConfig, estimator: Estimator, folder: PassingFolder, engine_factory: EngineFactory
) -> float:
    """Return the tokens a second of one replica; it writes its scores into ``folder``, as a run would."""
    examples = ExampleFile(folder.path / "rows.arrow")
    spec = TeacherSpec(
        engine=config.teacher.engine.model_copy(update={"replicas": 1}),
        model=_model(config, "teacher", estimator.work, folder.path),
        top_k=config.scores.top_k,
        longest_row=int(examples.lengths.max()),
    )
    vocab_size = estimator.shapes["teacher"].vocab_size
    folder.share()
    with TeacherPool(spec, engine_factory=engine_factory) as pool:
        identity = {"top_k": config.scores.top_k, "top_mass": config.scores.top_mass, "vocab_size": vocab_size}
        store = ScoreStore.open_or_create(folder.place("store"), identity, len(examples), -(-len(examples) // SHARDS))
        times, tokens = [], []
        for result in pool.score_missing(folder.path / "rows.arrow", store):
            times.append(time.monotonic())
            tokens.append(result.tokens)
    return sum(tokens[1:]) / (times[-1] - times[0])


def measure_training(config: RunConfig, work: Workload, folder: PassingFolder) -> float:
    """Return the tokens a second of one worker with its share of a batch, in a process of its own; needs Ray."""
    share = -(-config.train.batch_rows // config.workers.count)
    train = config.train.model_copy(update={"batch_rows": share, "sharding": "replicate"})
    store = folder.place("store") if needs_teacher(config.loss) else None
    source, rows = _model(config, "student", work, folder.path), str(folder.path / "rows.arrow")
    folder.share()
    student = _Student(source, config, train, rows, store, TRAINING_SECONDS)
    task = ray.remote(time_steps).options(
        name="plan",
        num_cpus=config.workers.cpus,
        num_gpus=config.workers.gpus,
        resources=dict(config.workers.resources),
        label_selector=dict(config.workers.labels),
        runtime_env={"env_vars": task_environment(config.workers.cpus, config.workers.gpus > 0)},
    )
    return float(ray.get(task.remote(student)))


def time_steps(student: _Student) -> float:
    """Return the tokens a second of optimizer steps, the first left out."""
    config, train = student.config, student.train
    worker = Worker.here(int(max(1, config.workers.cpus)), config.workers.gpus > 0)
    examples = ExampleFile(Path(student.examples))
    store = ScoreStore(student.store) if student.store else None
    sampler = StepSampler(len(examples), train.batch_rows, config.seed, store_order_first=True)
    rows = StoredRows(examples, store, config.scores.top_k, sampler)
    weights = StepWeights(config.loss, config.seed, store)
    module = make_student(student.model, config.student.lora, config.loss, train, worker)
    vocab_size, state = undistributed(module).vocab_size, LossState.first(config.loss)
    optimizer = make_optimizer(module, train.optimizer)
    tokens, step, started = 0, 0, 0.0
    with StepLoader(rows, train, worker.rank, worker.world_size, worker.device, vocab_size, sys.maxsize) as loader:
        while step < 3 or time.perf_counter() - started < student.seconds:
            if step == 1:
                started = time.perf_counter()
            step += 1
            accumulate_gradients(module, loader, weights, step, state, worker, train)
            clip_gradients(module, train.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += int(loader.batch(step).lengths.sum()) if step > 1 else 0
    if worker.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def _model(config: RunConfig, role: Role, work: Workload, folder: Path) -> ModelSource:
    """Return a pretrained model, or one of random weights, written now; an adapter is merged now."""
    models = Models(config, folder)
    models.merge_adapter(role)
    source, shape = models.begun(role), models.side(role).model
    if shape.kind == "pretrained":
        return source
    tokenizer = plain_tokenizer()
    if shape.kind == "cut":
        settings = meta_model(config, role, work).config
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=source.trust_remote_code)
    else:
        assert isinstance(shape, ScratchModel), "a plan is of language models"
        model = scratch_model(shape, tokenizer, scratch_vocab_size(config, work), config.longest_text, seed=0)
    Path(source.name).parent.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, Path(source.name))
    return source
