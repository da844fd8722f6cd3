"""Classifiers as ONNX: each kind beside transformers at several numbers of rows and tokens, and files that are no such thing."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, PreTrainedModel

from actors.examples import write_examples
from actors.model_source import ModelSource
from actors.networks.classifier import SmallClassifier, SmallClassifierConfig
from actors.records import Example, example_key
from orchestrator.classification import onnx_model
from orchestrator.classification.onnx_model import add_onnx, require_onnx, write_onnx
from orchestrator.config.load import ConfigError, apply_override, validate
from tests.logs import logged
from tests.orchestrator.config.test_run import changed
from tests.orchestrator.predicting.finished_runs import GRADING

VOCAB, LABELS, PADDING, SHAPE = 40, 3, 0, (1, 6, 8)


def network(kind: str, **shape: Any) -> SmallClassifier:
    """A network of random weights, large enough that its logits are some units apart."""
    sees = {"image_shape": SHAPE} if kind.startswith("image") else {"vocab_size": VOCAB, "pad_token_id": PADDING}
    torch.manual_seed(1)
    made = SmallClassifier(SmallClassifierConfig(network={"kind": kind, **shape}, num_labels=LABELS, **sees))
    with torch.no_grad():
        made.network.output.weight.mul_(20)
    return made


def bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    return BertForSequenceClassification(BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=LABELS,
        max_position_embeddings=32, initializer_range=0.5, pad_token_id=PADDING,
    ))  # fmt: skip


MODELS = {
    "text_mlp": lambda: network("text_mlp"), "text_cnn": lambda: network("text_cnn", kernels=(1, 2, 5)),
    "text_rnn": lambda: network("text_rnn"), "image_cnn": lambda: network("image_cnn", channels=4),
    "image_resnet": lambda: network("image_resnet", channels=4), "bert": bert,
}  # fmt: skip


def labelled(features: np.ndarray, row: int) -> Example:
    ids = np.append(features, row % LABELS).astype(np.int32)
    mask = np.arange(len(ids)) == len(ids) - 1
    return Example(ids, mask, example_key(ids, mask), row)


def folder_of(tmp_path: Path, model: PreTrainedModel, kind: str, rows: int = 20) -> tuple[ModelSource, Path]:
    """Write a model, and held-out rows for it."""
    draws = np.random.default_rng(2)
    features = [
        draws.random(SHAPE, dtype=np.float32).reshape(-1).view(np.int32)
        if kind.startswith("image") else draws.integers(1, VOCAB, draws.integers(1, 20)).astype(np.int32)
        for _ in range(rows)
    ]  # fmt: skip
    model.save_pretrained(tmp_path / "student")
    write_examples(tmp_path / "heldout.arrow", [labelled(one, row) for row, one in enumerate(features)])
    return ModelSource(str(tmp_path / "student"), classes=LABELS), tmp_path / "heldout.arrow"


def plain_logits(model: PreTrainedModel, **tensors: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model(**tensors).logits.numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_each_kind_of_classifier_is_the_same_as_onnx_at_any_size(tmp_path: Path, kind: str) -> None:
    source, heldout = folder_of(tmp_path, MODELS[kind](), kind)
    with logged() as said:
        facts = add_onnx(source, heldout)
    path = tmp_path / "student" / "model.onnx"
    assert facts["path"] == str(path) and facts["bytes"] == path.stat().st_size and facts["rows"] == 20
    assert facts["largest_gap"] < 1e-4 and said[-1].startswith(
        f"onnx: model.onnx has {facts['bytes']:,} bytes, and its logits of 20"
    )
    assert sorted(file.name for file in path.parent.iterdir()) == ["config.json", "model.onnx", "model.safetensors"]

    session = onnxruntime.InferenceSession(str(path))
    model = AutoModelForSequenceClassification.from_pretrained(source.name).eval()
    draws, spread = torch.Generator().manual_seed(3), 0.0
    for lengths in ([1], [9], [30], [3, 8], [12, 1, 5], list(range(1, 18))):
        if kind.startswith("image"):
            images = torch.rand((len(lengths), *SHAPE), generator=draws)
            (found,) = session.run(None, {"pixel_values": images.numpy()})
            expected = plain_logits(model, pixel_values=images)
        else:
            rows = [torch.randint(1, VOCAB, (length,), generator=draws) for length in lengths]
            given = {
                "input_ids": torch.stack([pad(row, (0, max(lengths) - len(row)), value=PADDING) for row in rows]),
                "attention_mask": torch.stack([pad(torch.ones_like(row), (0, max(lengths) - len(row))) for row in rows]),
            }
            (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
            alone = [plain_logits(model, input_ids=row[None], attention_mask=torch.ones_like(row[None])) for row in rows]
            expected = np.concatenate(alone)
        assert np.allclose(found, expected, atol=1e-4), (kind, lengths)
        spread = max(spread, float(np.ptp(expected)))
    assert spread > 0.1, "logits that are all alike would show nothing"


def test_a_file_that_predicts_something_else_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, heldout = folder_of(tmp_path, network("text_rnn"), "text_rnn")
    sound = onnx_model.PaddedRnn.forward

    def reads_padding(self: onnx_model.PaddedRnn, token_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return sound(self, token_ids, torch.ones_like(attention_mask) + 0 * attention_mask)

    monkeypatch.setattr(onnx_model.PaddedRnn, "forward", reads_padding)
    with pytest.raises(
        ValueError, match=r"^model\.onnx of the model in .* predicts something else than its weights: .* 0\.0001 would do"
    ):
        write_onnx(source, heldout)
    assert sorted(file.name for file in (tmp_path / "student").iterdir()) == ["config.json", "model.safetensors"]


def test_a_logit_that_is_none_is_no_agreement(tmp_path: Path) -> None:
    broken = network("text_mlp")
    with torch.no_grad():
        broken.network.output.bias.fill_(torch.nan)
    source, heldout = folder_of(tmp_path, broken, "text_mlp", rows=1)
    with pytest.raises(ValueError, match="up to nan apart"):
        write_onnx(source, heldout)


def test_packages_of_onnx_that_are_not_there_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    require_onnx()
    monkeypatch.setattr(onnx_model, "find_spec", lambda package: None)
    with pytest.raises(
        ValueError, match=r"^export\.onnx is true, and onnx, onnxruntime are not installed: pip install '\.\[onnx\]'"
    ):
        require_onnx()


def test_language_models_are_not_written_as_onnx() -> None:
    with pytest.raises(
        ConfigError, match=r"export\.onnx writes classifiers as ONNX, and the task is language_model, .*=false would do"
    ):
        changed("export.onnx=true")
    tree: dict[str, Any] = dict(GRADING)
    apply_override(tree, "export.onnx=true")
    assert validate(tree).export.onnx and not validate(GRADING | {"export": {}}).export.onnx
