"""Models of many families are computed as they are defined: here, in the student's loop, padded, and in vLLM.

The definition is each family's own eager code in float64, one row at a time.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from actors.attention import ATTENTION_TOLERANCE, attention_error, attention_used, exact, require_attention
from actors.config.model_kinds import PretrainedModel
from actors.config.models import EngineConfig
from actors.dataloader.collator import MicroBatch, collate
from actors.dataloader.scored_rows import all_rows
from actors.engines.base import TeacherSpec, engine_environment
from actors.engines.build import build_engine
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.models import head_makes_the_logits, load_model
from actors.records import Example
from actors.student.causal_lm import CausalStudent
from actors.teacher.parity import Probe, ScoreParity
from actors.teacher.reference_pass import references
from actors.teacher.replica import TeacherReplica
from losses.config import HardLabelLoss
from tests.worlds import VOCAB, random_examples

WINDOW = 16
LONGEST = 56  # tokens of a row: well beyond the window
HARD_LABEL = HardLabelLoss(kind="hard_label")
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "soft_caps": {
        "model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 32,
        "sliding_window": WINDOW,
    },
    "sinks": {
        "model_type": "gpt_oss", "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "window": {"model_type": "mistral", "sliding_window": WINDOW},
    "window_in_every_layer": {"model_type": "phi3", "sliding_window": WINDOW},
    "window_in_some_layers": {"model_type": "gemma3_text", "sliding_window": WINDOW, "query_pre_attn_scalar": 32},
    "chunks": {
        "model_type": "llama4_text", "attention_chunk_size": WINDOW, "intermediate_size_mlp": 96, "num_local_experts": 2,
        "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1],
    },
    "divided_logits": {
        "model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "multiplied_logits": {"model_type": "cohere", "logit_scale": 0.25},
    "experts": {
        "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small random model of each family, its sinks, biases and gains random as well."""
    root = tmp_path_factory.mktemp("families")
    for seed, (family, settings) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPE, **settings}))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 1:
                    weight.add_(0.3 * torch.randn_like(weight))
        model.save_pretrained(root / family)
    return root


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    rows = random_examples(6, seed=1, longest=LONGEST)
    assert sum(len(row.token_ids) > WINDOW + 8 for row in rows) >= 3
    return rows


def source(folder: Path, family: str, attention: str = "auto") -> ModelSource:
    return ModelSource(str(folder / family), attention=attention)


def as_defined(folder: Path, family: str) -> PreTrainedModel:
    """The model in float64, attention and experts eager."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder / family, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, row: Example) -> torch.Tensor:
    """[T, V], of the row alone."""
    logits: torch.Tensor = model(input_ids=torch.from_numpy(row.token_ids.astype(np.int64))[None], use_cache=False).logits[0]
    return logits


def padded(rows: list[Example], folder: Path) -> MicroBatch:
    """All rows in one micro-batch, as the student gets them."""
    write_examples(folder / "rows.arrow", rows)
    return collate(all_rows(ExampleFile(folder / "rows.arrow"), None, 8), range(len(rows)), VOCAB)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_computed_as_it_is_defined(folder: Path, rows: list[Example], family: str, tmp_path: Path) -> None:
    model, definition = load_model(source(folder, family)).eval(), as_defined(folder, family)
    wanted = [logits_of(definition, row).log_softmax(dim=1) for row in rows]
    for row, logprobs in zip(rows, wanted, strict=True):
        torch.testing.assert_close(logits_of(model, row).double().log_softmax(dim=1), logprobs, rtol=0, atol=1e-4)
    with torch.no_grad():
        student = CausalStudent(model, HARD_LABEL)
        found = student.target_logits(padded(rows, tmp_path)).double().log_softmax(dim=1)
    at_targets = [logprobs[row.target_positions - 1] for row, logprobs in zip(rows, wanted, strict=True)]
    torch.testing.assert_close(found, torch.cat(at_targets), rtol=0, atol=1e-4)
    assert student.through_head is (family != "chunks"), "Llama 4 has no decoder that transformers would name"


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("soft_caps", {"attn_logit_softcapping": None}),
        ("soft_caps", {"final_logit_softcapping": None}),
        ("window", {"sliding_window": None}),
        ("window_in_every_layer", {"sliding_window": None}),
        ("window_in_some_layers", {"sliding_window": 4096}),
        ("chunks", {"attention_chunk_size": 4096}),
        ("multiplied_logits", {"logit_scale": 1.0}),
    ],
)
def test_the_small_models_would_show_what_is_left_out(
    folder: Path, rows: list[Example], family: str, without: dict[str, Any]
) -> None:
    """Else the test above would prove nothing."""
    config = AutoConfig.from_pretrained(folder / family)
    for name, value in without.items():
        setattr(config, name, value)
    lacking = AutoModelForCausalLM.from_pretrained(folder / family, config=config, dtype=torch.float64).eval()
    longest = max(rows, key=lambda row: len(row.token_ids))
    whole, less = (logits_of(model, longest).log_softmax(dim=1) for model in (as_defined(folder, family), lacking))
    assert (whole - less).abs().max() > 0.05


# ---- what the user may say


def refuses(folder: Path, family: str, attention: str, precision: str = "bfloat16") -> str:
    """Return the words with which a value is refused; empty where it is not."""
    config = AutoConfig.from_pretrained(folder / family)
    try:
        require_attention(config, attention, "student.model.attention", {"train.precision": precision})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("family", "attention", "said"),
    [
        ("soft_caps", "sdpa", "student.model.attention sdpa leaves out the soft cap of 5 on the model's attention logits; "
                              "student.model.attention eager would do"),
        ("sinks", "sdpa", "student.model.attention sdpa is not for this model, transformers says: GptOssForCausalLM does"),
        ("sinks", "flash_attention_2", "flash_attention_2 leaves out the model's attention sinks; student.model.attention eager"),
        ("chunks", "flash_attention_3", "transformers says: Llama4ForCausalLM does not support Flash Attention 3 yet"),
    ],
)  # fmt: skip
def test_an_attention_that_cannot_be_right_is_refused_in_words(folder: Path, family: str, attention: str, said: str) -> None:
    assert said in refuses(folder, family, attention)


def test_flash_attention_is_for_passes_in_sixteen_bits_alone(folder: Path) -> None:
    assert refuses(folder, "window", "flash_attention_2", "float32") == (
        "student.model.attention flash_attention_2 computes in 16 bits alone, and train.precision is float32; train.precision "
        "bfloat16 would do, or student.model.attention auto"
    )
    assert refuses(folder, "window", "flash_attention_2") == "", "whether it is installed, the workers will see"
    assert exact(ModelSource("any", attention="flash_attention_2")).attention == "auto"
    assert exact(ModelSource("any", attention="sdpa")).attention == "sdpa"


def test_flex_attention_learns_on_gpus_alone(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "soft_caps")
    require_attention(config, "flex_attention", "student.model.attention", {"train.precision": "float32"})
    with pytest.raises(ValueError, match=r"student\.model\.attention flex_attention has no backward pass .* auto would do"):
        require_attention(config, "flex_attention", "student.model.attention", {}, learns_on_cpu=True)


@pytest.mark.parametrize(("family", "attention"), [(family, name) for family in FAMILIES for name in ("auto", "eager")])
def test_what_is_right_everywhere_is_refused_nowhere(folder: Path, family: str, attention: str) -> None:
    assert refuses(folder, family, attention, "float32") == ""


def test_the_librarys_own_choice_is_kept_where_it_is_right(folder: Path) -> None:
    used = {family: attention_used(load_model(source(folder, family)), "auto") for family in FAMILIES}
    assert {family for family, name in used.items() if name == "eager"} == {"soft_caps", "sinks"}
    assert set(used.values()) == {"eager", "sdpa"}
    assert attention_used(load_model(source(folder, "window", "eager")), "eager") == "eager"
    assert PretrainedModel(kind="pretrained", name="any").attention == "auto"


# ---- the proof


def sharpened(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """An attention that is wrong and says nothing."""
    return sdpa_attention_forward(module, 1.5 * query, *args, **kwargs)


@pytest.fixture
def wrong_attention() -> str:
    AttentionInterface.register("sharpened", sharpened)
    return "sharpened"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_passes_what_is_right(folder: Path, rows: list[Example], family: str) -> None:
    model = load_model(source(folder, family)).eval()
    assert attention_error(model, attention_used(model, "auto"), rows) < 1e-4


def test_the_proof_sees_a_soft_cap_that_is_left_out_and_leaves_the_model_as_it_was(folder: Path, rows: list[Example]) -> None:
    model = load_model(source(folder, "soft_caps", "sdpa")).eval()
    before = logits_of(model, rows[0])
    assert attention_error(model, "sdpa", rows) > 0.05
    assert torch.equal(logits_of(model, rows[0]), before)


def test_weights_that_are_no_numbers_are_not_laid_to_attention(folder: Path, rows: list[Example]) -> None:
    model = load_model(source(folder, "window")).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    assert attention_error(model, "sdpa", rows) == 0.0


def test_the_proof_sees_what_shows_beyond_the_window_alone(folder: Path, rows: list[Example]) -> None:
    """The positions within the window are the same with it and without."""
    AttentionInterface.register("endless", lambda module, query, key, value, mask, **kwargs: sdpa_attention_forward(
        module, query, key, value, None, **kwargs | {"is_causal": True}
    ))  # fmt: skip
    model = load_model(source(folder, "window")).eval()
    model.set_attn_implementation("endless")
    assert attention_error(model, "endless", rows) > ATTENTION_TOLERANCE


def test_a_reference_whose_attention_is_wrong_is_an_error_that_names_one_that_would_do(
    folder: Path, rows: list[Example], wrong_attention: str
) -> None:
    message = r"teacher\.model\.attention sharpened .* nats off those of eager .*; teacher\.model\.attention eager would do"
    with pytest.raises(ValueError, match=message):
        references(source(folder, "window", wrong_attention), Probe(rows), "cpu")
    assert not isinstance(references(source(folder, "window", "eager"), Probe(rows), "cpu"), str)


# ---- the head


def test_a_soft_cap_that_no_setting_names_is_found_out_on_small_logits_too(folder: Path) -> None:
    """A cap of 30 takes 4e-4 of a logit of 1."""

    class Capped(type(load_model(source(folder, "window")))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 30 * torch.tanh(outputs.logits / 30)
            return outputs

    model = Capped.from_pretrained(folder / "window")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)
    assert not head_makes_the_logits(model)


# ---- the engine


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_serves_soft_caps_as_the_reference_has_them(local_ray: None, folder: Path, rows: list[Example]) -> None:
    engine = EngineConfig(kind="vllm", dtype="float32", kv_cache_mib=16)
    actor = ray.remote(TeacherReplica).options(num_cpus=1, runtime_env={"env_vars": engine_environment(engine)})
    replica = actor.remote(TeacherSpec(engine, source(folder, "soft_caps"), 8, LONGEST), build_engine)
    found = ray.get(replica.start.remote(Probe(rows)), timeout=300).parity
    ray.kill(replica)
    assert isinstance(found, ScoreParity)
    assert found.largest_target_error < 1e-4 and found.topk_agreement == 1.0 and abs(found.slope - 1) < 1e-3
