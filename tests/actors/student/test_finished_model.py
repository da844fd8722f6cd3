"""The finished student: what is written is what was trained, in the type that was asked for, or it is not written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from actors.config.models import LoraAdapter, TrainConfig
from actors.lora import merge_adapters, shared_with_adapters
from actors.model_source import ModelSource
from actors.student.causal_lm import prepare_model
from actors.student.finished_model import ExportDiffers, read_proof, require_near
from actors.student.loop import distil
from actors.student.task import TrainingTask
from actors.student.train_checkpoints import NoCheckpoints
from losses.config import CoupledLoss
from tests.worlds import scored_world, tiny_llama, word_tokenizer

HEAD = LoraAdapter(rank=4, scale=32, modules=("q_proj", "lm_head"))


def task_in(folder: Path, **changes: Any) -> TrainingTask:
    """A training of four steps that moves far."""
    examples, store = scored_world(folder / "world", rows=16)
    if not (folder / "student").exists():
        tiny_llama(folder / "student", seed=1)
    word_tokenizer().save_pretrained(folder / "tokenizer")
    optimizer = {"learning_rate": 0.1, "schedule": "constant_with_warmup"}
    train = {"epochs": 2, "batch_rows": 8, "micro_batch_rows": 8, "optimizer": optimizer}
    task: dict[str, Any] = {
        "name": "train", "model": ModelSource(str(folder / "student")), "tokenizer": str(folder / "tokenizer"), "lora": None,
        "loss": CoupledLoss(kind="coupled"), "train": TrainConfig.model_validate(train), "examples": str(examples),
        "store": str(Path(store.place)), "top_k": 8, "wait_seconds": 1.0, "seed": 0, "threads": 1, "gpu": False,
        "metrics": str(folder / "metrics"),
        "output": str(folder / "out"),
    }  # fmt: skip
    return TrainingTask(**{**task, **changes})


def logits_of(folder: Path | str, **load: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits.float()


def test_adapters_on_a_tied_head_change_the_head_alone(tmp_path: Path) -> None:
    task = task_in(tmp_path, lora=HEAD)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    distil(task, NoCheckpoints())
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert not torch.allclose(after.get_output_embeddings().weight, after.get_input_embeddings().weight, atol=0.01)
    assert after.config.tie_word_embeddings is False
    proof = read_proof(tmp_path / "metrics" / "train_export.json")
    assert proof is not None and proof.untied == ("lm_head",) and proof.kl_of_export < 1e-8 and proof.dtype == "float32"


@pytest.mark.parametrize(
    "modules", [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head"), ("q_proj", "v_proj"), "all-linear"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_adapters_predict_what_they_did_before(tmp_path: Path, modules: Any, tied: bool) -> None:
    tiny_llama(tmp_path / "student", seed=1, tied=tied)
    model = prepare_model(ModelSource(str(tmp_path / "student")), LoraAdapter(rank=4, modules=modules), TrainConfig()).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn_like(weight)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(20)[None]).logits
    on_ends = {"lm_head", "model.embed_tokens"} & {f"{'model.' if m == 'embed_tokens' else ''}{m}" for m in modules}
    assert set(shared_with_adapters(model)) == (on_ends if tied else set())
    merge_adapters(model).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_student_is_stored_in_the_type_asked_for(tmp_path: Path, dtype: str) -> None:
    distil(task_in(tmp_path, dtype=dtype), NoCheckpoints())
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)
    exact = task_in(tmp_path, name="again", output=str(tmp_path / "exact"))
    distil(exact, NoCheckpoints())
    stored, trained = logits_of(tmp_path / "out", dtype=torch.float32), logits_of(tmp_path / "exact")
    trained, stored = trained.log_softmax(-1), stored.log_softmax(-1)
    kl = (trained.exp() * (trained - stored)).sum(-1).mean()
    proof = read_proof(tmp_path / "metrics" / "train_export.json")
    assert proof is not None and proof.kl_of_merging < 1e-8
    assert (float(kl) == 0) == (dtype == "float32") and float(kl) < 1e-2
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < (tmp_path / "exact" / "model.safetensors").stat().st_size or dtype == "float32"


def test_weights_that_overflow_their_type_are_not_kept(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "student", seed=1, tied=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e5  # above the largest float16
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(
        ExportDiffers,
        match=r"the finished model, written in float16 and loaded again, is not the one that "
        r"was trained",
    ):
        distil(task_in(tmp_path, dtype="float16"), NoCheckpoints())
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.*"))
    assert read_proof(tmp_path / "metrics" / "train_export.json") is None


def test_distributions_that_are_apart_name_how_far() -> None:
    one = torch.zeros(5, 4, dtype=torch.float64).log_softmax(-1)
    other = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).log_softmax(-1).expand(5, 4)
    with pytest.raises(
        ExportDiffers,
        match=r"with its adapters merged, is not .*on 5 tokens .* are 1\.07e-01 nats apart "
        r"\(may 0\.001",
    ):
        require_near(one, other, 1e-3, "with its adapters merged")
    with pytest.raises(ExportDiffers, match="nan nats apart"):
        require_near(one, torch.full_like(one, torch.nan), 1e-3, "gathered")
    assert require_near(one, one, 1e-3, "gathered") == 0


def test_generation_settings_that_cannot_be_saved_do_not_end_a_training(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "student", seed=1)
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 0}  # as published models have it
    (tmp_path / "student" / "generation_config.json").write_text(json.dumps(settings))
    task = task_in(tmp_path)
    GenerationConfig(eos_token_id=[3, 0], pad_token_id=0).save_pretrained(tmp_path / "tokenizer")
    distil(task, NoCheckpoints())
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [3, 0] and "temperature" not in written
