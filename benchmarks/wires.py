"""What the wires of rollouts cost and how near each comes to the whole teacher, on the student's own text.

    python -m benchmarks.wires RUN [--engine vllm] [--rows 64] [--new-tokens 64] [--rounds 3]

RUN is the folder of a run whose models are fine-tuned (``python -m orchestrator finetune CONFIG``). Its student answers the
prompts of held-out rows; the teacher scores what it wrote by each wire. Bytes a target as the rollout log has them; seconds of
scoring as the caller sees them, medians over rounds in turn; and of each loss, computed from what the log gives back: value off
by / gradient off by, as in ``benchmarks.truncation``, against the teacher's full logits. No bar: what is lost depends on the
models.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.config.models import EngineConfig
from actors.config.rollouts import Wire
from actors.dataloader.hidden_states import as_hidden_teacher
from actors.dataloader.scored_rows import as_teacher
from actors.engines.base import TeacherSpec, engine_environment
from actors.engines.build import build_engine
from actors.engines.teacher_head import read_head
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores
from actors.rollouts.base import Prompt, SamplerSpec, Sampling, written_row
from actors.rollouts.build import build_sampler
from actors.score_store.encoding import RowEncoding
from actors.teacher.replica import TeacherReplica
from benchmarks.bars import alternating_seconds, print_table
from benchmarks.truncation import Sample, off_by
from losses.config import CoupledLoss, TeacherLoss
from losses.divergence_config import JensenShannon, ReverseKL, SkewReverseKL
from losses.teachers import DenseTeacher, Teacher

TOP_KS = (8, 32, 64)
BYTES_IN_INDEX = 4
LOSSES: Mapping[str, TeacherLoss] = {
    "reverse KL": CoupledLoss(kind="coupled", divergence=ReverseKL()),
    "Jensen-Shannon": CoupledLoss(kind="coupled", divergence=JensenShannon()),
    "skew reverse KL": CoupledLoss(kind="coupled", divergence=SkewReverseKL()),
    "forward KL": CoupledLoss(kind="coupled"),
}
Scorer = Callable[[Sequence[Example]], list[TeacherScores]]


@dataclass(frozen=True, slots=True)
class Way:
    """What the teacher is asked for."""

    wire: Wire
    top_k: int

    def rows(self, examples: Sequence[Example]) -> list[Example]:
        """Return the rows as the sampler hands them on."""
        if self.wire != "candidates":
            return [replace(example, candidates=None) for example in examples]
        return [replace(one, candidates=one.candidates[:, : self.top_k]) for one in examples if one.candidates is not None]

    def encoding(self, vocab_size: int, hidden_size: int) -> RowEncoding:
        """Return how the log keeps the scores."""
        unions = self.wire == "candidates"
        kept = hidden_size if self.wire == "hidden" else 0
        return RowEncoding(2 * self.top_k if unions else self.top_k, vocab_size, ragged=unions, hidden_size=kept)


WAYS = (*(Way(wire, top_k) for wire in ("top_k", "candidates") for top_k in TOP_KS), Way("hidden", TOP_KS[0]))


def written_by_the_student(
    student: ModelSource, prompts: Sequence[np.ndarray], new_tokens: int, ends: tuple[int, ...]
) -> list[Example]:
    """Return a row for each prompt, with the student's most likely tokens at each target."""
    longest = max(len(prompt) for prompt in prompts)
    engine, sampling = EngineConfig(kind="transformers", dtype="float32"), Sampling(new_tokens)
    sampler = build_sampler(SamplerSpec(engine, student, sampling, ends, longest, candidates=max(TOP_KS)))
    asked = [Prompt(prompt, row) for row, prompt in enumerate(prompts)]
    return [written_row(prompt, response) for prompt, response in zip(asked, sampler.sample(asked), strict=True)]


@torch.no_grad()
def logits_at_targets(source: ModelSource, examples: Sequence[Example]) -> Tensor:
    """Return a model's logits [N, V] at the targets of all rows, by plain forward passes."""
    model = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32).eval()
    found = [
        model(torch.from_numpy(example.token_ids.astype(np.int64))[None]).logits[0, example.target_positions - 1]
        for example in examples
    ]
    return torch.cat(found)


def scorer_of(spec: TeacherSpec) -> Scorer:
    """Return an engine's way to score rows; one of vLLM has a process of its own, which holds no second one."""
    if spec.engine.kind == "transformers":
        return build_engine(spec).score
    environment = {"env_vars": engine_environment(spec.engine)}
    actor: Any = ray.remote(TeacherReplica).options(num_cpus=0, runtime_env=environment).remote(spec)
    ray.get(actor.start.remote())
    return lambda rows: list(ray.get(actor.score.remote(rows)))


def measure(run: Path, options: argparse.Namespace) -> tuple[list[list[str]], int, int]:
    """Return a line for each way, how many targets there were, and V."""
    teacher, student = (ModelSource(str(run / "models" / f"{role}_finetuned")) for role in ("teacher", "student"))
    heldout = ExampleFile(run / "data" / "heldout.arrow")
    prompts = [heldout[row].last_prompt for row in range(min(options.rows, len(heldout)))]
    last_tokens = {int(heldout[row].token_ids[-1]) for row in range(len(heldout))}
    ends = tuple(last_tokens) if len(last_tokens) == 1 else ()
    examples = written_by_the_student(student, prompts, options.new_tokens, ends)
    targets = torch.from_numpy(np.concatenate([example.targets for example in examples]).astype(np.int64))
    sample = Sample(DenseTeacher(logits_at_targets(teacher, examples), targets), logits_at_targets(student, examples))
    head = read_head(teacher, torch.float32)

    engine = EngineConfig(kind=options.engine, dtype="float32", cpus=1, kv_cache_mib=64)
    longest = max(len(example.token_ids) for example in examples)
    scorers = {way: scorer_of(TeacherSpec(engine, teacher, way.top_k, longest, wire=way.wire)) for way in WAYS}
    tasks = {repr(way): partial(scorers[way], way.rows(examples)) for way in WAYS}
    seconds = alternating_seconds(tasks, options.rounds)
    lines = []
    for way in WAYS:
        encoding = way.encoding(head.vocab_size, head.weight.shape[1])
        contents = [encoding.encode(scores) for scores in tasks[repr(way)]()]
        read = [encoding.decode(one, row.key, len(row.targets)) for one, row in zip(contents, examples, strict=True)]
        said: Teacher = as_hidden_teacher(examples, read, head) if way.wire == "hidden" else as_teacher(read)
        size = sum(len(content) for content in contents) / len(targets) + BYTES_IN_INDEX
        pace = 1000 * statistics.median(seconds[repr(way)]) / len(targets)
        off = [off_by(sample, said, loss) for loss in LOSSES.values()]
        lines.append([way.wire, str(way.top_k), f"{size:.0f}", f"{pace:.3f}", *off])
    return lines, len(targets), head.vocab_size


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--engine", default="transformers", choices=["vllm", "transformers"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.engine == "vllm":
        ray.init(log_to_driver=False)
    lines, targets, vocab_size = measure(options.run, options)
    print(f"\n{targets} targets written by the student, V = {vocab_size}; value off by / gradient off by\n")
    print_table(["wire", "K", "bytes a target", "s a 1000 targets", *LOSSES], lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
