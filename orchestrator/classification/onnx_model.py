"""A classifier as ONNX: one file beside its weights, which other programs run without torch; it counts once it agrees with them.

B rows, T tokens of a row, W width of an embedding, H units in each direction, C classes.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.config.networks import IMAGE_NETWORKS
from actors.examples import ExampleFile
from actors.files import write_atomically
from actors.model_source import ModelSource
from actors.models import load_classifier
from actors.networks.classifier import SmallClassifier, class_logits, images_of
from actors.networks.text import TextRnnNetwork, mean_over_tokens

logger = logging.getLogger("atkd")

FILE = "model.onnx"
HEADING = "## As ONNX"
PACKAGES = ("onnx", "onnxruntime")
OPSET = 18
MOST_APART = 1e-4
"""Between a logit by ONNX and by torch, both in float32."""
BATCHES = (1, 2, 7, 16)
"""Rows of the batches that are compared, once the shortest rows and once the longest."""


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What was written, and how near it is to the weights."""

    path: str
    bytes: int
    rows: int
    """Held-out rows that were compared."""
    largest_gap: float
    """Between two logits of a row."""

    def line(self) -> str:
        """Return it in a sentence."""
        return (
            f"{FILE} has {self.bytes:,} bytes, and its logits of {self.rows} held-out rows in several batches are at most "
            f"{self.largest_gap:.1e} from those of the weights"
        )


def require_onnx() -> None:
    """Raise if what writes and tries ONNX files is not installed.

    Raises:
        ValueError: with the command that installs it.
    """
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise ValueError(
            f"export.onnx is true, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install '.[onnx]' would do, or export.onnx=false"
        )


def add_onnx(source: ModelSource, heldout: Path) -> dict[str, Any]:
    """Write ``model.onnx`` as ``write_onnx`` does; log what it is like, and return it in plain fields."""
    written = write_onnx(source, heldout)
    logger.info(f"onnx: {written.line()}")
    _tell_on_card(Path(source.name) / "README.md", written)
    return asdict(written)


def _tell_on_card(card: Path, written: OnnxFile) -> None:
    """Say on a model's card, if it has one, that the file is there, and how near it is to the weights."""
    text = card.read_text() if card.exists() else HEADING
    if HEADING not in text:
        write_atomically(card, f"{text.rstrip()}\n\n{HEADING}\n\nFor programs without torch: {written.line()}.\n".encode())


def write_onnx(source: ModelSource, heldout: Path) -> OnnxFile:
    """Write ``model.onnx`` into a classifier's folder, once it predicts what its weights do.

    Args:
        source: the folder.
        heldout: rows as the classifier reads them.

    Raises:
        ValueError: if it cannot be written as ONNX, or predicts something else.
    """
    # Attention written out as products is traced as it is defined.
    model, rows = load_classifier(source, attention="eager").eval(), ExampleFile(heldout)
    path, longest = Path(source.name) / FILE, np.argsort(rows.lengths, kind="stable")[-2:]
    unproven = path.with_suffix(".onnx.tmp")
    try:
        export_graph(model, [rows[int(place)].token_ids for place in longest], unproven)
        compared, gap = largest_gap(unproven, model, rows)
        if not gap <= MOST_APART:
            raise ValueError(
                f"{FILE} of the model in {source.name} predicts something else than its weights: logits of held-out rows are up "
                f"to {gap:.1e} apart, and {MOST_APART:g} would do; export.onnx=false leaves it out"
            )
        unproven.rename(path)
    finally:
        unproven.unlink(missing_ok=True)
    return OnnxFile(str(path), path.stat().st_size, compared, gap)


def export_graph(model: PreTrainedModel, rows: Sequence[np.ndarray], path: Path) -> None:
    """Write a classifier as ONNX, whatever the number of rows and of tokens.

    Args:
        model: on the CPU.
        rows: one or two to trace it by, each with its label as the last.
        path: of the file.
    """
    given = inputs_of(model, [rows[0], rows[-1]])
    images = "pixel_values" in given
    graph = (OnnxImages(model) if images else OnnxTexts(model)).eval()
    tensors = tuple(torch.from_numpy(array) for array in given.values())
    axes = {name: {0: "rows"} if images else {0: "rows", 1: "tokens"} for name in given}
    # torch's newer exporter (dynamo=True) fixes the number of tokens that a GRU reads, and took five times as long or more.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, whose result is compared, and of the newer exporter
        torch.onnx.export(
            graph, tensors, str(path), input_names=list(given), output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "rows"}}, opset_version=OPSET, dynamo=False,
        )  # fmt: skip


def inputs_of(model: PreTrainedModel, rows: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
    """Return what the ONNX file is given for rows, each with its label as the last: by name, side by side."""
    features = [row[:-1] for row in rows]
    if _kind_of(model) in IMAGE_NETWORKS:
        bits = torch.from_numpy(np.stack(features).astype(np.int64))
        return {"pixel_values": images_of(bits, model.config.image_shape).numpy()}
    width, padding = max(map(len, features)), getattr(model.config, "pad_token_id", None) or 0
    token_ids = np.full((len(rows), width), padding, dtype=np.int64)
    attention_mask = np.zeros_like(token_ids)
    for place, row in enumerate(features):
        token_ids[place, : len(row)], attention_mask[place, : len(row)] = row, 1
    return {"input_ids": token_ids, "attention_mask": attention_mask}


def largest_gap(path: Path, model: PreTrainedModel, rows: ExampleFile) -> tuple[int, float]:
    """Return how many rows were compared, and the largest distance between a logit by ONNX and by torch; nan if one is none."""
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    order, gap, compared = np.argsort(rows.lengths, kind="stable"), 0.0, set[int]()
    for size in BATCHES:
        for places in (order[:size], order[-size:]):
            batch = [rows[int(place)].token_ids for place in places]
            (found,) = session.run(["logits"], dict(inputs_of(model, batch)))
            gap = float(np.maximum(gap, np.abs(found - _by_torch(model, batch)).max()))  # a nan stays one
            compared |= set(places.tolist())
    return len(compared), gap


@torch.inference_mode()
def _by_torch(model: PreTrainedModel, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the logits [B, C] of rows as training and evaluation compute them, each by itself."""
    found = []
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64))[None]
        found.append(class_logits(model, ids, torch.ones_like(ids), torch.tensor([len(row) - 1])))
    return torch.cat(found).numpy()


class OnnxTexts(nn.Module):
    """A classifier of texts as a function from tensors to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        network = model.network if isinstance(model, SmallClassifier) else None
        self.network = PaddedRnn(network) if isinstance(network, TextRnnNetwork) else network
        self.model = model if network is None else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, C] of token ids [B, T], of which those count whose mask [B, T] is 1."""
        if self.network is not None:
            return self.network(input_ids, attention_mask)
        assert self.model is not None
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


class OnnxImages(nn.Module):
    """A classifier of images as a function from tensors to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits [B, C] of images [B, channels, height, width]."""
        return self.model(pixel_values=pixel_values).logits


class PaddedRnn(nn.Module):
    """``TextRnnNetwork`` without packed rows, which ONNX has not: the GRU that reads backwards is given each row turned round."""

    def __init__(self, network: TextRnnNetwork) -> None:
        super().__init__()
        self.embedding, self.output, both = network.embedding, network.output, network.states
        self.forwards, self.backwards = (nn.GRU(both.input_size, both.hidden_size, batch_first=True) for _ in range(2))
        for states, suffix in ((self.forwards, ""), (self.backwards, "_reverse")):
            for name, parameter in states.named_parameters():
                parameter.data = getattr(both, f"{name}{suffix}").data

    def forward(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, C] of token ids [B, T], padded on the right, of which those count whose mask [B, T] is 1."""
        embedded, lengths = self.embedding(token_ids), attention_mask.sum(dim=1, keepdim=True)  # [B, T, W], [B, 1]
        places = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
        turned = torch.where(places < lengths, lengths - 1 - places, places)[:, :, None]  # [B, T, 1], its own inverse
        ahead = self.forwards(embedded)[0]
        back = self.backwards(embedded.gather(1, turned.expand_as(embedded)))[0]
        states = torch.cat([ahead, back.gather(1, turned.expand_as(back))], dim=2)  # [B, T, 2 H]
        return self.output(mean_over_tokens(states, attention_mask))


def _kind_of(model: PreTrainedModel) -> str | None:
    return str(model.config.network["kind"]) if isinstance(model, SmallClassifier) else None
