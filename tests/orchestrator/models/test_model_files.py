"""What a model's files say: whole models, adapters, formats that are not read, types of weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from actors.lora import load_adapter
from actors.model_source import ModelSource
from actors.models import load_model
from orchestrator.config.load import validate
from orchestrator.models.model_files import base_of_adapter, require_model_folder, stored_dtype
from orchestrator.models.models import Models
from tests.worlds import tiny_llama, word_tokenizer

KEY = "teacher.model.name"


def adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Write an adapter for a model, with weights that change it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            weight.data = 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def run_of(folder: Path, teacher: Path) -> Models:
    student = tiny_llama(folder / "student", seed=2)
    paths = {"teacher": teacher, "student": student}
    sides = {role: {"model": {"kind": "pretrained", "name": str(path)}} for role, path in paths.items()}
    return Models(validate({"name": "small", "output": str(folder), **sides}), folder / "run")


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
])  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_over_its_base_becomes_a_whole_model(tmp_path: Path, tied: bool, settings: dict[str, Any]) -> None:
    base = tiny_llama(tmp_path / "base", seed=1, tied=tied)
    folder = adapter(base, tmp_path / "adapter", **settings)
    models = run_of(tmp_path, folder)
    assert models.tokenizer_for([]).get_vocab() == word_tokenizer().get_vocab()  # the base's: the adapter brings none
    said = models.merge_adapter("teacher")
    assert said == f"teacher: the adapter {folder} was merged into {base}"
    assert models.merge_adapter("teacher") is None and models.merge_adapter("student") is None
    ids = torch.arange(12)[None]
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        expected, found = adapted(input_ids=ids).logits, load_model(models.begun("teacher")).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert models.ready("teacher") == models.begun("teacher") and models.named("teacher").name == str(base)


def test_a_merge_that_changes_the_model_is_refused(tmp_path: Path) -> None:
    class Uneven(LlamaForCausalLM):
        """Its logits depend on how its weights are held."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = found.logits + any("lora_" in name for name, _ in self.named_parameters())
            return found

    base = tiny_llama(tmp_path / "base", seed=1)
    folder = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"cannot be merged: the merged model's logits are up to 1 from those of base and "
        r"adapter"):
        load_adapter(str(folder), Uneven.from_pretrained(base))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = adapter(tiny_llama(tmp_path / "base", seed=1, hidden_size=32), tmp_path / "adapter", target_modules=["q_proj"])
    tiny_llama(tmp_path / "base", seed=1, hidden_size=16)
    with pytest.raises(ValueError, match=r"the adapter in .*adapter does not fit its base model: "):
        run_of(tmp_path, folder).merge_adapter("teacher")


def test_an_adapter_whose_base_is_gone_is_refused(tmp_path: Path) -> None:
    folder = adapter(tiny_llama(tmp_path / "base", seed=1), tmp_path / "adapter", target_modules=["q_proj"])
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "someone/base"}))
    with pytest.raises(ValueError, match=r"teacher\.model\.name .*adapter is an adapter for 'someone/base', which cannot be "
        r"loaded"):
        run_of(tmp_path, folder).merge_adapter("teacher")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"its adapter_config\.json cannot be read"),
        ("{}", r"its adapter_config\.json cannot be read: KeyError"),
        ('{"base_model_name_or_path": null}', r"names no base_model_name_or_path; write the base's name there, or merge the "
            r"adapter"),
    ],
)
def test_an_adapter_that_does_not_name_its_base(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{KEY} .*{message}"):
        base_of_adapter(tmp_path, KEY)


def test_a_folder_with_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    (tiny_llama(tmp_path / "model", seed=1) / "adapter_config.json").write_text("{}")
    assert base_of_adapter(tmp_path / "model", KEY) is None
    assert base_of_adapter(Path("someone/model"), KEY) is None


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.gguf", r"is one file \(GGUF\), and a model is a folder.*gguf_file='model\.gguf'\)\.save_pretrained.*better, "
            r"name the"),
        ("model.bin", r"is one file \(pickle\), and a model is a folder.*save_pretrained has written would do"),
        ("model.safetensors", r"is one file \(safetensors\), and a model is a folder"),
        ("README", r"is one file \(unknown\), and a model is a folder"),
    ],
)
def test_a_file_is_no_model(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=f"^{KEY} .*{message}"):
        require_model_folder(tmp_path / file, KEY)


def test_a_gguf_file_that_is_not_there_and_a_folder_of_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is one file \(GGUF\)"):
        require_model_folder(tmp_path / "absent.gguf", KEY)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds GGUF weights alone, which are quantized for other programs; transformers "
        r"writes safet"):
        require_model_folder(tmp_path, KEY)
    with pytest.raises(ValueError, match=r"teacher\.model\.name .* holds GGUF weights alone"):
        run_of(tmp_path / "r", tmp_path).begun("teacher")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_of_stored_weights(tmp_path: Path, dtype: str) -> None:
    folder = tiny_llama(tmp_path / "model", seed=1)
    AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(folder)
    assert stored_dtype(ModelSource(str(folder))) == dtype
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "float32"}))
    assert stored_dtype(ModelSource(str(folder))) == dtype, "the weights say it, whatever config.json says"
    (folder / "model.safetensors").unlink()
    assert stored_dtype(ModelSource(str(folder))) == "float32"
