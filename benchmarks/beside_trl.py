"""The same distillation by a run and by TRL's GKDTrainer: same rows, models, batches, steps, precision and threads, in turn.

    pip install trl accelerate
    python -m benchmarks.beside_trl configs/study_losses.yaml train.epochs=3

The run ends after its training. TRL's trainer asks the teacher again at each step (``lmbda=0``: the data's own rows;
``beta=0``: forward KL over the whole vocabulary); a run asks it once for each row, and keeps its top K. Of a run the seconds
are those of scoring and training, starting processes and loading models included; of the trainer those of its steps alone.
What both need, such as fine-tuning, is in neither.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.examples import ExampleFile
from benchmarks.bars import Bar, print_table, report
from orchestrator.config.load import load_config
from orchestrator.models.models import Models
from orchestrator.run.run_dir import result_path

FASTER = 2.0
NO_LABEL = -100


class Collator:
    """Rows of a file of examples, by their position, as TRL's trainer wants them: [B, T] token ids, mask and labels."""

    def __init__(self, examples: ExampleFile, pad_id: int) -> None:
        self._examples, self._pad_id = examples, pad_id

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        some = [self._examples[row["position"]] for row in rows]
        token_ids = [torch.tensor(one.token_ids, dtype=torch.long) for one in some]
        learnt = [torch.tensor(one.loss_mask, dtype=torch.bool) for one in some]
        labels = [ids.masked_fill(~mask, NO_LABEL) for ids, mask in zip(token_ids, learnt, strict=True)]
        return {
            "input_ids": pad_sequence(token_ids, batch_first=True, padding_value=self._pad_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in token_ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
        }


def train_with_trl(run: Path) -> dict[str, Any]:
    """Train the student of a run as it was before, by TRL's trainer; return seconds, steps and the last loss."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config, steps = load_config(str(run / "config.yaml")), int(stage(run, "train")["steps"])
    models, examples, train = Models(config, run), ExampleFile(run / "data" / "train.arrow"), config.train
    torch.set_num_threads(max(1, int(config.workers.cpus)))
    tokenizer = AutoTokenizer.from_pretrained(models.tokenizer_folder)
    teacher = AutoModelForCausalLM.from_pretrained(
        models.ready("teacher").name, dtype=getattr(torch, config.teacher.engine.dtype)
    )
    student = AutoModelForCausalLM.from_pretrained(models.ready("student").name, dtype=torch.float32)
    settings = GKDConfig(
        output_dir=str(run / "trl"), lmbda=0.0, beta=0.0, temperature=1.0, use_cpu=config.workers.gpus == 0,
        bf16=train.precision == "bfloat16", max_steps=steps,
        per_device_train_batch_size=train.micro_batch_rows,
        gradient_accumulation_steps=max(1, train.batch_rows // train.micro_batch_rows),
        learning_rate=train.optimizer.learning_rate, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
        gradient_checkpointing=train.gradient_checkpointing, seed=config.seed,
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=settings, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"position": position} for position in range(len(examples))]),
        data_collator=Collator(examples, tokenizer.pad_token_id or 0),
    )  # fmt: skip
    started = time.monotonic()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": time.monotonic() - started, "steps": trainer.state.global_step, "loss": losses[-1]}


def stage(run: Path, name: str) -> dict[str, Any]:
    """Return what a finished stage of a run left."""
    facts: dict[str, Any] = json.loads(result_path(run, name).read_text())
    return facts


def measured(arguments: Sequence[str]) -> dict[str, Any]:
    """Run this file's other half in a process of its own; return what it measured."""
    command = [sys.executable, "-m", "benchmarks.beside_trl", *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def main(words: list[str] | None = None) -> int:
    """Train twice, print and compare with the bar."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", help="a run's YAML file")
    parser.add_argument("overrides", nargs="*", help="settings of the run")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)  # the folder of a run: this is TRL's turn
    asked = parser.parse_args(words)
    if importlib.util.find_spec("trl") is None:
        parser.error("trl is not installed here; pip install trl accelerate would do")
    if asked.trl is not None:
        print(json.dumps(train_with_trl(asked.trl)))
        return 0
    if asked.config is None:
        parser.error("the YAML file of a run is missing; configs/study_losses.yaml would do")
    overrides = ["loss={kind: coupled, divergence: forward_kl}", "scores.overlap=false", *asked.overrides]
    config = load_config(asked.config, overrides)
    if code := subprocess.run([sys.executable, "-m", "orchestrator", "train", asked.config, *overrides]).returncode:
        return code  # it said why
    run = config.run_dir
    score, train, trl = stage(run, "score"), stage(run, "train"), measured(["--trl", str(run)])
    assert trl["steps"] == train["steps"], f"TRL did {trl['steps']} steps where the run did {train['steps']:g}"
    examples = ExampleFile(run / "data" / "train.arrow")
    ours = score["seconds"] + train["seconds"]
    print_table(
        ["", "scoring, s", "training, s", "of it steps, s", "together, s", "last loss"],
        [
            ["a run", *(f"{one:.0f}" for one in (score["seconds"], train["seconds"], train["step_seconds"], ours)),
             f"{train['last_loss']:.3f}"],
            ["TRL's GKDTrainer", "", *3 * [f"{trl['seconds']:.0f}"], f"{trl['loss']:.3f}"],
        ],
    )  # fmt: skip
    print(f"\n{len(examples)} rows, {examples.tokens:,} tokens, {trl['steps']} steps")
    return report([Bar("times as fast, scoring included", trl["seconds"] / ours, FASTER, at_least=True)])


if __name__ == "__main__":
    sys.exit(main())
