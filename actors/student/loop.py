"""The training loop of one Ray Train worker: distils the student, and fine-tunes models with the hard-label loss."""

import math
import time
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from actors.config.models import TrainConfig, needs_teacher
from actors.dataloader.collator import MicroBatch
from actors.dataloader.rollout_rows import RolloutRows
from actors.dataloader.row_sources import RowSources
from actors.dataloader.sampler import StepSampler, Visits, steps_in
from actors.dataloader.scored_rows import ScoredRows, StoredRows
from actors.dataloader.step_loader import StepLoader
from actors.dataloader.step_weights import StepWeights
from actors.engines.teacher_head import read_head
from actors.examples import ExampleFile
from actors.monitors.gpu import GpuMonitor
from actors.monitors.metrics_log import MetricsLog, step_metrics
from actors.score_store.rollout_log import RolloutLog
from actors.score_store.store import ScoreStore
from actors.student.causal_lm import make_student
from actors.student.checkpoint import Progress
from actors.student.finished_model import write_finished_model
from actors.student.hand_over import ShareKeeper, WeightPublisher
from actors.student.model import autocast, set_gradient_sync, undistributed
from actors.student.optimizer import clip_gradients, make_optimizer, make_schedule
from actors.student.ranks import Worker
from actors.student.resize import ResizeMonitor
from actors.student.task import TrainingDiverged, TrainingTask, WorkerResult
from actors.student.train_checkpoints import Checkpoints
from actors.student.validation import Validator
from losses.distillation import LossSums
from losses.loss_state import LossState


def distil(task: TrainingTask, checkpoints: Checkpoints) -> WorkerResult:
    """Distil the student from its last checkpoint on, or from the start, and write the finished model.

    The student of a trial is validated on the way, and may be told to stop. Workers whose number may grow leave at a
    checkpoint when there is room for more of them.
    """
    worker = Worker.here(task.threads, task.gpu)
    examples = ExampleFile(Path(task.examples))
    store = ScoreStore(task.store) if task.store and needs_teacher(task.loss) else None
    sampler = StepSampler(len(examples), task.train.batch_rows, task.seed, task.train.first_epoch == "store_order")
    visits = visits_of(task, steps_in(len(examples), task.train.batch_rows, task.train.epochs))
    rows = rows_of(task, StoredRows(examples, store, task.top_k, sampler), sampler, visits, worker)
    step_weights = StepWeights(task.loss, task.seed, store)

    torch.manual_seed(task.seed)  # of the adapters: another trial of this process may have drawn before
    student = make_student(task.model, task.lora, task.loss, task.train, worker)
    vocab_size = undistributed(student).vocab_size
    gpu = GpuMonitor.of(undistributed(student).model, worker.device, task.train.precision)
    total_steps = visits.total_steps
    optimizer = make_optimizer(student, task.train.optimizer)
    schedule = make_schedule(optimizer, task.train.optimizer, total_steps)
    validator, resize_monitor = Validator(task, worker, vocab_size), ResizeMonitor(task, worker)
    shares, publisher = ShareKeeper(task, worker, vocab_size), WeightPublisher(task, worker, visits.deals)

    done = checkpoints.load(student, optimizer, schedule, worker) or Progress(0, LossState.first(task.loss))
    shares.after(student, done.step)
    publisher.after(student, done.step)
    goes_on, resize_requested = True, False
    loader = StepLoader(rows, task.train, worker.rank, worker.world_size, worker.device, vocab_size, total_steps)
    with closing(MetricsLog.on_first_worker(worker.rank, task, first_step=done.step + 1)) as log, loader:
        while goes_on and not resize_requested and done.step < total_steps:
            started, step = time.perf_counter(), done.step + 1
            batch = loader.batch(step)
            waited_seconds = step_weights.wait_for_scores(batch, task.wait_seconds)
            worker.seed_step(task.seed, step)

            sums = accumulate_gradients(student, loader, step_weights, step, done.loss_state, worker, task.train)
            sums = worker.sum_over_workers(sums)
            gradient_norm = clip_gradients(student, task.train.optimizer.clip_norm)
            require_finite(task, step, sums, gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            learning_rate = float(schedule.get_last_lr()[0])
            schedule.step()

            metrics = step_metrics(
                sums, task.loss, int(batch.lengths.sum()), rows.epochs_after(step), started, waited_seconds, learning_rate,
                gradient_norm, total_steps, worker.world_size,
            )  # fmt: skip
            metrics |= gpu.numbers(batch.lengths, float(sums.targets), metrics)
            log.write(step, metrics | step_weights.easy_border(batch) | done.loss_state.numbers(task.loss))
            done = Progress(step, done.loss_state.after(task.loss, step, total_steps, float(sums.loss)))
            shares.after(student, step)
            publisher.after(student, step)
            goes_on = validator.goes_on(student, step)  # before a checkpoint: a run that resumes from one is validated there
            if goes_on and step % task.train.checkpoint_every_steps == 0 and step < total_steps:
                checkpoints.save(student, optimizer, schedule, done, worker)
                resize_requested = resize_monitor.is_due()

    if task.output is not None and not resize_requested:
        write_finished_model(student, task, Path(task.output), worker)
    return WorkerResult(resize_requested=resize_requested)


def visits_of(task: TrainingTask, deals: int) -> Visits:
    """Return which steps learn from which deal of rows: each from its own, but where the student's text is visited again."""
    return Visits(deals) if task.rollouts is None else task.rollouts.policy.visits(deals)


def rows_of(task: TrainingTask, data: StoredRows, sampler: StepSampler, visits: Visits, worker: Worker) -> ScoredRows:
    """Return where the rows of each step come from: the data, or in part what the student writes while it learns."""
    if (rollouts := task.rollouts) is None:
        return data
    sources, head = RowSources(rollouts.policy, task.seed, sampler.rows_of, visits.deals), None
    if rollouts.head_of is not None:
        head = read_head(rollouts.head_of, getattr(torch, rollouts.head_dtype), worker.device)
    return RolloutRows(data, RolloutLog(rollouts.log), sources, head, visits)


def accumulate_gradients(
    student: nn.Module, loader: StepLoader, step_weights: StepWeights, step: int, state: LossState, worker: Worker,
    train: TrainConfig,
) -> LossSums:  # fmt: skip
    """Run this worker's forward and backward passes of a step; return its sums.

    The weights hold the division by the step's tokens already, so losses and gradients simply add up over passes and
    workers. DDP and FSDP take the mean over workers, which the factor ``world_size`` makes a sum.
    """
    layout = loader.layout(step)
    weights = step_weights.of_step(loader.batch(step), layout, step, state)
    sums, last = LossSums.zero(worker.device), len(layout[worker.rank]) - 1
    for index, one in enumerate(loader.passes(step)):
        set_gradient_sync(student, index == last)
        part = forward(student, one.micro_batch.weighed([weights[row] for row in one.rows]), state, train)
        (part.loss * worker.world_size).backward()
        if one.rows:
            sums = sums + part.detach()
    return sums


def forward(student: nn.Module, batch: MicroBatch, state: LossState, train: TrainConfig) -> LossSums:
    """Run one forward pass in the configured precision."""
    with autocast(train, batch.token_ids.device):
        return LossSums(*student(batch, state))


def require_finite(task: TrainingTask, step: int, sums: LossSums, gradient_norm: float) -> None:
    """Stop before a step that would spoil the weights."""
    loss = float(sums.loss)
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise TrainingDiverged(
            f"{task.name}: step {step} has loss {loss} and gradient norm {gradient_norm}; "
            f"a learning rate below {task.train.optimizer.learning_rate} or a smaller clip_norm may do"
        )
