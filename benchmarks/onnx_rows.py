"""How long one row takes a classifier by ONNX and by torch, on one thread each, and how large its files are.

    python -m benchmarks.onnx_rows runs/grading_cpu

RUN is the folder of a run that was exported with export.onnx. Tensors of the rows are there before time is taken.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from actors.examples import ExampleFile
from actors.models import load_classifier
from benchmarks.bars import alternating_seconds, print_table
from orchestrator.classification.onnx_model import FILE, inputs_of
from orchestrator.config.load import load_run
from orchestrator.models.models import Models


def main(arguments: Sequence[str] | None = None) -> int:
    """Print milliseconds of one row and bytes on disk."""
    parser = argparse.ArgumentParser(description="Compare a classifier as ONNX with its weights, row by row.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=200, help="held-out rows of a round")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    config, folder = load_run(options.run)
    student = Models(config, folder).distilled()
    torch.set_num_threads(1)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(Path(student.name) / FILE), settings, providers=["CPUExecutionProvider"])
    model, heldout = load_classifier(student).eval(), ExampleFile(folder / "data" / "heldout.arrow")
    given = [inputs_of(model, [heldout[place].token_ids]) for place in range(min(options.rows, len(heldout)))]
    tensors = [{name: torch.from_numpy(array) for name, array in one.items()} for one in given]

    def by_onnx() -> list[np.ndarray]:
        return [session.run(None, dict(one))[0] for one in given]

    @torch.inference_mode()
    def by_torch() -> list[torch.Tensor]:
        return [model(**one).logits for one in tensors]

    seconds = alternating_seconds({"onnxruntime": by_onnx, "torch": by_torch}, options.rounds)
    files = {"onnxruntime": Path(student.name) / FILE, "torch": Path(student.name) / "model.safetensors"}
    print_table(
        ("", "ms a row, median", "bytes"),
        [
            (name, f"{1000 * statistics.median(found) / len(given):.4f}", f"{files[name].stat().st_size:,}")
            for name, found in seconds.items()
        ],
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
