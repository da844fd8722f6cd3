"""How far an engine's scores lie from the teacher in float32, by type; and what faults of a teacher look like beside that.

    python -m benchmarks.parity MODEL [--rows FILE --prompt '{{ question }}' --response answer] [--dtypes bfloat16 float32]

MODEL is a folder with a Llama-type model and its tokenizer. Rows are those of a file, or the tasks that the project makes itself;
each is taken as far as its 64th target, as a run takes those that it compares. vLLM serves them in each type. Faults are
computed in float32 on the first half of the rows, and judged by the bounds of bfloat16. Those bounds, in
``orchestrator/run/score_parity.py``, rest on these tables.
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from actors.config.models import DType, EngineConfig
from actors.engines.base import TeacherSpec, engine_environment, scores_from_likeliest
from actors.engines.build import build_engine
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.models import load_model
from actors.records import Example, TeacherScores
from actors.teacher.parity import LEAST_LIKELY, RIGHT, ComparedRow, compare
from actors.teacher.reference_pass import Reference, beginning, compare_row, forward_pass
from benchmarks.bars import Bar, print_table, report
from orchestrator.config.data import BuiltinSource, DataConfig, FilesSource
from orchestrator.config.formats import InstructionFormat
from orchestrator.data.dataset import prepare_data
from orchestrator.run.score_parity import TOLERANCES, check_raw, check_served

TOP_K, LONGEST = 64, 512
DRAWS, DRAWN_TARGETS = 400, 256
"""Draws of rows, as a run compares some; each goes on until it has so many targets."""
QUANTILES = (0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Fault:
    """A way in which a teacher may be served wrongly."""

    name: str
    model: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model
    """Makes the model that is served, from the right one."""
    temperature: float = 1.0
    """By which its logits are divided."""
    later: int = 0
    """By how many positions its predictions are read too late."""


def with_rotary_base(factor: float) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Return what changes the base of a model's rotary embeddings."""

    def change(model: PreTrainedModel) -> PreTrainedModel:
        config = copy.deepcopy(model.config)
        config.rope_parameters = {**config.rope_parameters, "rope_theta": factor * config.rope_parameters["rope_theta"]}
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        return model

    return change


def without_layer(share: float) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Return what leaves out one of a model's layers, by where it stands: 0 for the first, 1 for the last."""

    def change(model: PreTrainedModel) -> PreTrainedModel:
        del model.model.layers[int(share * (len(model.model.layers) - 1))]
        return model

    return change


def with_noise(share: float) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Return what moves each weight of a model's layers by so large a share of their spread: another model, and a near one."""

    @torch.no_grad()
    def change(model: PreTrainedModel) -> PreTrainedModel:
        generator = torch.Generator().manual_seed(0)
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight.add_(share * weight.float().std() * torch.randn(weight.shape, generator=generator).to(weight.dtype))
        return model

    return change


FAULTS = (
    Fault("read one position late", later=1),
    Fault("temperature 0.9", temperature=0.9),
    Fault("temperature 1.05", temperature=1.05),
    Fault("rotary base x 10", with_rotary_base(10.0)),
    Fault("rotary base x 2", with_rotary_base(2.0)),
    Fault("last layer left out", without_layer(1.0)),
    Fault("a middle layer left out", without_layer(0.5)),
    Fault("weights moved by 10 %", with_noise(0.1)),
    Fault("weights moved by 3 %", with_noise(0.03)),
)


def read_rows(model: Path, arguments: argparse.Namespace, folder: Path) -> list[Example]:
    """Return the beginnings of rows until they have as many targets as are wanted."""
    data = DataConfig(
        source=FilesSource(kind="files", path=arguments.rows) if arguments.rows else BuiltinSource(kind="builtin"),
        format=InstructionFormat(kind="instruction", prompt=arguments.prompt, response=arguments.response)
        if arguments.rows else InstructionFormat(kind="instruction"),
        max_tokens=LONGEST, heldout_rows=10,
    )  # fmt: skip
    prepare_data(data, lambda texts: AutoTokenizer.from_pretrained(model), folder)
    examples, rows, targets = ExampleFile(folder / "train.arrow"), [], 0
    for position in range(len(examples)):
        rows.append(beginning(examples[position]))
        targets += len(rows[-1].targets)
        if targets >= arguments.targets:
            break
    return rows


def served_by_vllm(model: Path, dtype: DType, rows: Sequence[Example]) -> list[TeacherScores]:
    """Return what vLLM serves; in a process of its own, whose environment must be set before it begins."""
    engine = EngineConfig(kind="vllm", dtype=dtype, kv_cache_mib=256)
    served = build_engine(TeacherSpec(engine, ModelSource(str(model)), TOP_K, max(len(row.token_ids) for row in rows)))
    return served.score(rows)


@torch.inference_mode()
def served_with_fault(model: Path, fault: Fault, rows: Sequence[Example]) -> list[TeacherScores]:
    """Return the scores of a faulty model, without rounding."""
    teacher = fault.model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    spec = TeacherSpec(EngineConfig(kind="transformers"), ModelSource(str(model)), TOP_K, LONGEST)
    scores = []
    for row in rows:
        logits = teacher(input_ids=torch.from_numpy(row.token_ids.astype(np.int64))[None], use_cache=False).logits[0].float()
        logprobs = (logits[row.target_positions - 1 + fault.later] / fault.temperature).log_softmax(dim=1)  # [N, V]
        at_target = logprobs.gather(1, torch.from_numpy(row.targets.astype(np.int64))[:, None])[:, 0]
        best = logprobs.topk(TOP_K + 1, dim=1)
        found = scores_from_likeliest(row, at_target.numpy(), best.indices.numpy(), best.values.numpy(), spec)
        assert found is not None, "one candidate more than K was taken"
        scores.append(found)
    return scores


def draws_of(rows: Sequence[ComparedRow]) -> list[list[ComparedRow]]:
    """Draw rows without putting them back, until each draw has enough targets."""
    generator, draws = np.random.default_rng(0), []
    for _ in range(DRAWS):
        draw: list[ComparedRow] = []
        for position in generator.permutation(len(rows)):
            draw.append(rows[position])
            if sum(len(row.served.target_logprob) for row in draw) >= DRAWN_TARGETS:
                break
        draws.append(draw)
    return draws


def errors_of(rows: Sequence[ComparedRow]) -> tuple[np.ndarray, np.ndarray]:
    """Return the error of each target in nats, and what the reference says of it, float64 [N] each."""
    expected = np.concatenate([row.target_logprob[RIGHT] for row in rows])
    return np.abs(expected - np.concatenate([row.served.target_logprob for row in rows])), expected


def spread_lines(name: str, rows: Sequence[ComparedRow]) -> list[list[str]]:
    """Return a line for likely targets and one for unlikely ones: how their errors are spread."""
    error, expected = errors_of(rows)
    lines = []
    for group, chosen in ((f">= {LEAST_LIKELY:g}", expected >= LEAST_LIKELY), (f"< {LEAST_LIKELY:g}", expected < LEAST_LIKELY)):
        some = error[chosen]
        if len(some):
            numbers = [some.mean(), np.sqrt((some**2).mean()), *(np.quantile(some, share) for share in QUANTILES)]
            lines.append([name, group, str(len(some)), *(f"{number:.2g}" for number in numbers)])
    return lines


def draw_line(name: str, dtype: DType, rows: Sequence[ComparedRow]) -> tuple[list[str], float]:
    """Return a line of what draws come to, least to largest, and the share of draws that a run would refuse."""
    found = [compare(draw) for draw in draws_of(rows)]
    refused = [
        "FAILED" in (check_raw(one).state, check_served(one, TOLERANCES[dtype]).state) for one in found
    ]  # fmt: skip
    numbers = (
        [one.mean_target_error for one in found], [one.high_target_error for one in found],
        [one.largest_target_error for one in found], [100 * one.topk_agreement for one in found], [one.slope for one in found],
    )  # fmt: skip
    cells = [f"{min(values):.3g} {np.median(values):.3g} {max(values):.3g}" for values in numbers]
    share = float(np.mean(refused))
    return [name, *cells, f"{share:.0%}"], share


def compared(references: Sequence[Reference], served: Sequence[TeacherScores]) -> list[ComparedRow]:
    """Return each row's scores beside the reference."""
    return [compare_row(*pair) for pair in zip(references, served, strict=True)]


def main() -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", help="a file of rows, JSON Lines or another kind that data.source.path takes")
    parser.add_argument("--prompt", default="{{ prompt }}", help="Jinja template over a row's fields")
    parser.add_argument("--response", default="completion", help="name of the field with the response")
    parser.add_argument("--targets", type=int, default=4000)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16", "float32"], choices=list(TOLERANCES))
    parser.add_argument("--without-faults", action="store_true")
    arguments = parser.parse_args()
    os.environ.update(engine_environment(EngineConfig(kind="vllm", cpus=os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(arguments.model, arguments, Path(folder))
    with torch.inference_mode():
        teacher = load_model(ModelSource(str(arguments.model))).eval()
        references = [forward_pass(teacher, row) for row in rows]
    bars, spreads, draws = [], [], []
    for dtype in arguments.dtypes:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = compared(references, pool.submit(served_by_vllm, arguments.model, dtype, rows).result())
        spreads += spread_lines(dtype, found)
        line, share = draw_line(dtype, dtype, found)
        draws.append(line)
        bars.append(Bar(f"draws refused, vLLM in {dtype}", share, 0.0))
    print(f"\n{len(rows)} rows; log-probabilities of targets against float32, nats\n")
    print_table(["served in", "log-probability", "targets", "mean", "RMS", "90 %", "99 %", "largest"], spreads)
    half = (len(rows) + 1) // 2
    for fault in () if arguments.without_faults else FAULTS:
        found = compared(references[:half], served_with_fault(arguments.model, fault, rows[:half]))
        line, share = draw_line(fault.name, "bfloat16", found)
        draws.append(line)
        bars.append(Bar(f"draws refused, {fault.name}", share, 1.0, at_least=True))
    print(f"\n{DRAWS} draws of rows with {DRAWN_TARGETS} targets or a few more: least, median and largest of each\n")
    print_table(["served", "mean", "99 %", "largest", "top-K agree, %", "slope", "refused"], draws)
    return report(bars)


if __name__ == "__main__":
    raise SystemExit(main())
