"""A run that is scored already, small enough that a trial of it takes a fraction of a second, and searches of it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.dataloader.sampler import steps_in
from actors.examples import ExampleFile, write_examples
from actors.score_store.store import ScoreStore
from orchestrator.config.load import validate
from orchestrator.config.run import RunConfig
from orchestrator.config.tune import rung_steps
from orchestrator.data.tokenizers import load_tokenizer
from orchestrator.models.models import Models
from orchestrator.run.run_dir import RunDir
from orchestrator.run.scoring import ScoringStage
from orchestrator.search.bound_space import BoundSpace, search_of
from orchestrator.search.controller import Assignment, SearchController
from orchestrator.search.driver import SharedInputs, TrialQueue, assignments_to_repeat, begin_ledger, run_search
from orchestrator.search.ledger import Ledger, Search
from orchestrator.search.schedulers import RuleScheduler, StoppingRule, scheduler_of
from orchestrator.search.trial import TrialContext
from orchestrator.search.tune import source_of, spec_of
from tests.worlds import VOCAB, heldout_texts, random_examples, scores_from_logits, tiny_llama

TRAIN_ROWS, HELDOUT_ROWS, TOP_K = 32, 7, 8
RATE = "train.optimizer.learning_rate"
TUNE: dict[str, Any] = {
    "space": {RATE: [3e-3]}, "search": "grid", "rungs": 3, "scheduler": "none", "trials_in": "reused_process",
}  # fmt: skip


def config_in(folder: Path, **sections: Any) -> RunConfig:
    """The configuration of the run in a folder; ``sections`` are laid over it. A trial has 12 steps."""
    tree: dict[str, Any] = {
        "name": "small", "output": str(folder / "runs"),
        "data": {"heldout_rows": HELDOUT_ROWS},
        "teacher": {
            "model": {"kind": "pretrained", "name": str(folder / "teacher")},
            "engine": {"kind": "transformers", "dtype": "float32"},
        },
        "scores": {"top_k": TOP_K, "rows_per_shard": 8},
        "student": {"model": {"kind": "pretrained", "name": str(folder / "student")}},
        "train": {"epochs": 3, "batch_rows": 8, "micro_batch_rows": 8, "optimizer": {"learning_rate": 3e-3}},
        "evaluate": {"batch_rows": 3, "generate_rows": 0},
        "tune": TUNE,
    }  # fmt: skip
    for section, said in sections.items():
        tree[section] = {**tree.get(section, {}), **said} if isinstance(said, Mapping) else said
    return validate(tree)


def scored_run(folder: Path, **sections: Any) -> RunConfig:
    """Make a run whose scores stand, so that a search begins with its trials; return its configuration."""
    config = unscored_run(folder, **sections)
    with RunDir.open(
        config,
    ) as run_dir:
        stage = ScoringStage(config, run_dir, Models(config, run_dir.path))
        assert stage.training_store is not None
        fill(stage.training_store, ExampleFile(run_dir.path / "data" / "train.arrow"), seed=5)
        fill(stage.heldout_store, ExampleFile(run_dir.path / "data" / "heldout.arrow"), seed=6)
        facts = {"tokens": 100, "seconds": 1.0}
        run_dir.finish("score", {"train": facts, "heldout": facts, "seconds": 2.0})
    return config


def unscored_run(folder: Path, **sections: Any) -> RunConfig:
    """Make a run whose rows and models stand; return its configuration."""
    for seed, name in enumerate(("teacher", "student"), start=1):
        if not (folder / name).exists():
            tiny_llama(folder / name, seed=seed)
    config = config_in(folder, **sections)
    with RunDir.open(
        config,
    ) as run_dir:
        (run_dir.path / "data").mkdir()
        write_examples(run_dir.path / "data" / "train.arrow", random_examples(TRAIN_ROWS, seed=3))
        write_examples(run_dir.path / "data" / "heldout.arrow", random_examples(HELDOUT_ROWS, seed=4))
        (run_dir.path / "data" / "heldout_texts.jsonl").write_text(heldout_texts(["w1 w2"] * HELDOUT_ROWS, ("first", "second")))
        models = Models(config, run_dir.path)
        teacher = models.begun("teacher")  # the student may be one that is not there
        load_tokenizer(teacher.name, None, teacher.trust_remote_code).save_pretrained(models.tokenizer_folder)
        models.make_scratch_models(models.tokenizer())
        run_dir.finish("prepare", {"counts": {}, "source_sha256": {}, "seconds": 0.0})
    return config


def fill(store: ScoreStore, examples: ExampleFile, seed: int) -> None:
    """Write all shards, with what a random teacher says of the rows."""
    generator = np.random.default_rng(seed)
    for shard in store.missing_shards():
        mine = [examples[position] for position in store.positions(shard)]
        logits = [3 * generator.normal(size=(len(example.token_ids), VOCAB)) for example in mine]
        store.write_shard(shard, mine, [scores_from_logits(*both, TOP_K) for both in zip(mine, logits, strict=True)])


def ground_of(config: RunConfig) -> SharedInputs:
    """What the trials of a scored run stand on."""
    stores = json.loads((config.run_dir / "scores.json").read_text())
    steps = steps_in(TRAIN_ROWS, config.train.batch_rows, config.train.epochs)
    return SharedInputs(config.run_dir, Path(stores["train"]), Path(stores["heldout"]), steps)


def search(config: RunConfig, folder: Path, at_once: int = 2) -> Search:
    """Run the search of the section ``tune``, or go on with it, as the command does once the scores stand."""
    bound, ground, tune = search_of(config), ground_of(config), config.tune
    spec = spec_of(config, ground)
    found = begin_ledger(folder, spec)

    def queue_of(controller: Any, trials: Path) -> TrialQueue:
        return TrialQueue(
            controller, trials, source_of(bound, found), assignments_to_repeat(found), len(found.trials), config.seed
        )

    return run_search(
        bound, ground, folder, spec, scheduler_of(tune), queue_of,
        in_process=tune.trials_in == "reused_process", concurrent=at_once, answers=tune.answers,
    )  # fmt: skip


def trial_context(config: RunConfig, folder: Path, controller: Any = None) -> TrialContext:
    """What the trials of a search in ``folder`` are told, if they train in the process that is asked."""
    ground, bound = ground_of(config), BoundSpace(config, config.tune.searched)
    stores = (ground.training_store, ground.heldout_store)
    return TrialContext(
        bound, ground.run_folder, folder / "trials", *stores, config.tune.rungs, in_process=True, controller=controller
    )


def measures_of(config: RunConfig, folder: Path, assignments: list[Assignment]) -> list[list[dict[str, Any]]]:
    """Train trials one after the other in this process; return what was measured of each, rung after rung."""
    from actors.student.loop import distil
    from actors.student.train_checkpoints import NoCheckpoints

    shutil.rmtree(folder, ignore_errors=True)
    spec = spec_of(config, ground_of(config))
    Ledger(folder / "ledger.jsonl").begin_search(spec)
    none = RuleScheduler(StoppingRule("none", "min"))
    controller = ray.remote(SearchController).options(num_cpus=0).remote(folder / "ledger.jsonl", spec, none)
    for assignment in assignments:
        ray.get(controller.begin.remote(assignment))
        distil(trial_context(config, folder, controller).task(assignment), NoCheckpoints())
        ray.get(controller.ended.remote(assignment.trial, 12, 0))
    found: Search = ray.get(controller.search.remote())
    ray.kill(controller)
    assert all(rung.step == step for trial in found.trials for rung, step in zip(trial.rungs, rung_steps(12, 3), strict=True))
    return [[dict(rung.metrics) for rung in trial.rungs] for trial in found.trials]
