"""A step of packed rows has the loss and gradients of the same rows side by side, and models that mix rows are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from actors.config.models import LoraAdapter, TrainConfig
from actors.dataloader.collator import collate
from actors.dataloader.sampler import StepSampler
from actors.dataloader.scored_rows import StoredRows, all_rows
from actors.dataloader.step_loader import StepLoader
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.score_store.store import ScoreStore
from actors.student.causal_lm import CausalStudent, make_student, packing_error, ready_to_learn, require_apart
from actors.student.loop import accumulate_gradients
from actors.student.ranks import Worker
from losses.config import HardLabelLoss, LossConfig
from losses.loss_state import LossState
from tests.worlds import VOCAB, scored_world, tiny_llama, word_tokenizer

CPU = Worker(0, 1, torch.device("cpu"))
ROWS = 7
LOSS: TypeAdapter[LossConfig] = TypeAdapter(LossConfig)
LOSSES: dict[str, dict[str, Any]] = {
    "atkd": {"kind": "atkd"},
    "a selection by the student": {"kind": "coupled", "divergence": "jensen_shannon", "tokens": "student_entropy"},
}
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2, "head_dim": 8,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WINDOW = 5  # tokens: below most rows, and far below a pack
GEMMA2 = {
    "model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0,
    "attn_pdrop": 0,
}  # fmt: skip
GPT_NEO = {
    "model_type": "gpt_neo", "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
    "window_size": WINDOW,
}  # fmt: skip
APART: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "soft caps and a window": GEMMA2,
    "a window in some layers": {"model_type": "gemma3_text", "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "a window": {"model_type": "mistral", "sliding_window": WINDOW},
    "gpt_neox": {"model_type": "gpt_neox"},
    "learned positions": GPT2,
    "experts": {"model_type": "qwen2_moe", **EXPERTS},
}
MIXED: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "alibi": {"model_type": "bloom", "n_layer": 2, "n_head": 4},
    "recurrent": {"model_type": "mamba"},
    "convolutions": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
}

Gradients = dict[str, torch.Tensor]


def model_of(settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    attention = "eager" if settings["model_type"] == "gemma2" else None
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**SHAPE, **settings}), attn_implementation=attention
    )
    with torch.no_grad():
        for weight in model.parameters():  # what begins at zero or one would hide what goes through it
            weight.add_(0.05 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    scored_world(folder, rows=16)
    return folder


def packing(tokens: int, **more: Any) -> TrainConfig:
    return TrainConfig(batch_rows=ROWS, micro_batch_tokens=tokens, packing=True, **more)


def step_of(
    student: nn.Module, world: Path, train: TrainConfig, loss: LossConfig, worker: Worker = CPU
) -> tuple[float, Gradients]:
    """The loss of a step on one worker, and what it adds to the gradients."""
    student.zero_grad()
    examples, store = ExampleFile(world / "train.arrow"), ScoreStore(world / "store")
    rows = StoredRows(examples, store, 8, StepSampler(len(examples), ROWS, seed=0, store_order_first=True))
    weights = StepWeights(loss, seed=0, store=store)
    with StepLoader(rows, train, worker.rank, worker.world_size, worker.device, VOCAB, last_step=1) as loader:
        sums = accumulate_gradients(student, loader, weights, 1, LossState.first(loss), worker, train)
    return float(sums.loss), {name: one.grad.clone() for name, one in student.named_parameters() if one.grad is not None}


def assert_same_step(found: tuple[float, Gradients], expected: tuple[float, Gradients], tolerance: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys() and expected[1]
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("family", APART)
def test_packed_rows_give_the_loss_and_gradients_of_padded_ones(world: Path, family: str) -> None:
    student = CausalStudent(model_of(APART[family]).train(), LOSS.validate_python(LOSSES["atkd"]))
    for name in LOSSES:
        student.loss = loss = LOSS.validate_python(LOSSES[name])
        expected = step_of(student, world, TrainConfig(batch_rows=ROWS, micro_batch_rows=ROWS), loss)
        for tokens in (30, 200):  # several passes; and one of all rows, longer than what positions the models know
            assert_same_step(step_of(student, world, packing(tokens), loss), expected)
    student.through_head = False  # by the model's own logits, as where something else makes them
    assert_same_step(step_of(student, world, packing(200), loss), expected)
    require_apart(student, ModelSource("here"), packing(200), CPU)


@pytest.mark.parametrize(
    "more", [{"gradient_checkpointing": True}, {"lora": LoraAdapter(rank=2, modules=("q_proj", "lm_head"))}], ids=str
)
def test_what_saves_memory_changes_nothing(world: Path, more: dict[str, Any]) -> None:
    lora, loss = more.pop("lora", None), LOSS.validate_python(LOSSES["atkd"])
    model = ready_to_learn(model_of({**APART["llama"], "tie_word_embeddings": False}), lora, TrainConfig(**more))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # they begin at zero, where half of the gradients vanish
            nn.init.normal_(weight, std=0.1)
    student = CausalStudent(model, loss)
    expected = step_of(student, world, TrainConfig(batch_rows=ROWS, micro_batch_rows=3), loss)
    assert_same_step(step_of(student, world, packing(60), loss), expected)
    assert any("lora" in name for name in expected[1]) == (lora is not None)


def test_in_16_bits_packing_is_as_near_to_float32_as_padding(world: Path) -> None:
    loss = LOSS.validate_python(LOSSES["atkd"])
    student = CausalStudent(model_of(APART["llama"]).train(), loss)
    exact, padded, packed = (
        step_of(student, world, train, loss)
        for train in (packing(60), TrainConfig(batch_rows=ROWS, precision="bfloat16"), packing(60, precision="bfloat16"))
    )
    assert packed[0] == pytest.approx(exact[0], rel=1e-2)
    for name, gradient in exact[1].items():
        off, theirs = ((other[1][name] - gradient).norm() / gradient.norm() for other in (packed, padded))
        assert off < 2 * theirs + 1e-3, name


def test_the_shares_of_two_workers_add_up_to_the_step(world: Path) -> None:
    loss = LOSS.validate_python(LOSSES["atkd"])
    student = CausalStudent(model_of(APART["llama"]).train(), loss)
    expected = step_of(student, world, TrainConfig(batch_rows=ROWS, micro_batch_rows=ROWS), loss)
    shares = [step_of(student, world, packing(30), loss, Worker(rank, 2, CPU.device)) for rank in (0, 1)]
    # each share is taken times the number of workers, since DDP takes their mean
    together = {name: (shares[0][1][name] + shares[1][1][name]) / 2 for name in expected[1]}
    assert_same_step((shares[0][0] + shares[1][0], together), expected)


@pytest.mark.parametrize("family", APART)
def test_no_row_sees_another(world: Path, family: str) -> None:
    student = CausalStudent(model_of(APART[family]).eval(), HardLabelLoss(kind="hard_label"))
    batch = all_rows(ExampleFile(world / "train.arrow"), None, 8)
    packed = collate(batch, [4, 0, 2], VOCAB, packed=True)
    places = torch.cat([torch.full((len(batch.example(row).token_ids),), index) for index, row in enumerate([4, 0, 2])])
    of_targets = places[packed.predicting]
    with torch.no_grad():
        before = student.target_logits(packed)
        for changed in range(3):
            other = torch.where(places == changed, (packed.token_ids + 7) % VOCAB, packed.token_ids)
            packed.token_ids.copy_(other)
            after = student.target_logits(packed)
            for index in range(3):
                of_row = of_targets == index
                if index == changed:
                    assert not torch.allclose(after[of_row], before[of_row], atol=1e-3)
                else:  # experts are multiplied in other groups, so that rounding may differ
                    torch.testing.assert_close(after[of_row], before[of_row], rtol=0, atol=1e-5)
            before = after


@pytest.mark.parametrize("family", MIXED)
def test_a_model_that_mixes_rows_is_refused(family: str) -> None:
    student = CausalStudent(model_of(MIXED[family]).train(), HardLabelLoss(kind="hard_label"))
    told = rf"^train\.packing true: {type(student.model).__name__} does not keep rows apart .* train\.packing false would do$"
    with pytest.raises(ValueError, match=told):
        require_apart(student, ModelSource("here"), packing(64), CPU)
    assert student.training, "the trial leaves the student as it was"


class Positionless(LlamaForCausalLM):
    """A model whose code knows no positions."""

    def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_mask_as_long_as_the_positions_of_a_model_bounds_its_packs() -> None:
    student = CausalStudent(model_of(GPT_NEO), HardLabelLoss(kind="hard_label"))
    require_apart(student, ModelSource("here"), packing(32), CPU)
    with pytest.raises(ValueError, match=r"GPTNeoForCausalLM takes no packed rows \(The size of tensor .*\); train\.pa"):
        require_apart(student, ModelSource("here"), packing(33), CPU)


def test_too_little_memory_is_no_matter_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    student = CausalStudent(model_of(APART["llama"]), HardLabelLoss(kind="hard_label"))

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(student.model.model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        require_apart(student, ModelSource("here"), packing(32), CPU)


def test_a_model_that_takes_no_positions_is_refused(tmp_path: Path) -> None:
    model = Positionless.from_pretrained(tiny_llama(tmp_path / "model", seed=0))
    student = CausalStudent(model, HardLabelLoss(kind="hard_label"))
    student.through_head = False
    with pytest.raises(ValueError, match=r"^train\.packing true: Positionless takes no packed rows \(.*'position_ids'\)"):
        require_apart(student, ModelSource("here"), packing(64), CPU)


def test_packs_longer_than_the_chunks_of_attention_are_refused() -> None:
    chunks = {
        "model_type": "llama4_text", "attention_chunk_size": 64, "intermediate_size_mlp": 96, "num_local_experts": 2,
        "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1],
    }  # fmt: skip
    student = CausalStudent(model_of(chunks), HardLabelLoss(kind="hard_label"))
    require_apart(student, ModelSource("here"), packing(64), CPU)
    told = r"^train\.packing true with train\.micro_batch_tokens 65: .* chunks of 64 tokens .* train\.micro_batch_tokens 64 would"
    with pytest.raises(ValueError, match=told):
        require_apart(student, ModelSource("here"), packing(65), CPU)


def test_a_student_is_tried_when_it_is_made(tmp_path: Path) -> None:
    model_of(MIXED["opt"]).save_pretrained(tmp_path / "opt")
    word_tokenizer().save_pretrained(tmp_path / "opt")
    source, loss = ModelSource(str(tmp_path / "opt")), HardLabelLoss(kind="hard_label")
    with pytest.raises(ValueError, match="OPTForCausalLM does not keep rows apart"):
        make_student(source, None, loss, packing(64), CPU)
    make_student(source, None, loss, TrainConfig(micro_batch_tokens=64), CPU)
    llama = ModelSource(str(tiny_llama(tmp_path / "llama", seed=0)))
    student = make_student(llama, None, loss, packing(64), CPU)
    assert packing_error(student, 64, CPU.device) < 1e-5  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.drill
def test_a_compiled_student_learns_the_same_from_packs(world: Path, tmp_path: Path) -> None:
    source, loss = ModelSource(str(tiny_llama(tmp_path / "model", seed=0, layers=2))), LOSS.validate_python(LOSSES["atkd"])
    plain, compiled = (
        step_of(make_student(source, None, loss, train, CPU), world, train, loss)
        for train in (packing(30), packing(30, compile=True))
    )
    assert_same_step(compiled, plain)
