"""The bytes that a plan says, held against tensors, files and the profiler."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.config.models import EngineConfig, LoraAdapter, OptimizerConfig, ScoresConfig, TrainConfig
from actors.config.workers import WorkersConfig
from actors.student.optimizer import make_optimizer
from benchmarks.plan import predicted_student, run_student
from benchmarks.plan_cases import SMALL, Student, cut, model, write_world
from orchestrator.planning.memory import (
    cache_bytes,
    chunk_bytes,
    replica_memory,
    saved_bytes,
    scoring_bytes,
    store_bytes,
    training_memory,
    weights_bytes,
)
from orchestrator.planning.shapes import Passes, shape_of
from tests.actors.score_store.test_class_store import distributions, labelled, scores_of, store_in
from tests.worlds import VOCAB, random_examples, scored_world

SETTINGS = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip
PASS = Passes(rows=4, tokens=20, targets=30, accumulates=True, padding=1.0, context=20.0)


def bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_gradients_and_moments_are_those_of_real_tensors() -> None:
    llama = LlamaForCausalLM(SETTINGS).train()
    optimizer = make_optimizer(llama, OptimizerConfig())
    llama(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [weight.grad for weight in llama.parameters() if weight.grad is not None]
    found = training_memory(shape_of(llama), PASS, TrainConfig(), WorkersConfig(), saved=1 << 24, recomputed=0, chunk=1 << 20)
    assert found.moment == "the loss"
    assert found.parts["weights"] == bytes_of(list(llama.parameters()))
    assert found.parts["optimizer"] == bytes_of(moments)
    assert found.parts["gradients"] == bytes_of(gradients) + bytes_of([llama.lm_head.weight])
    assert found.total == sum(found.parts.values())


def test_workers_keep_copies_or_share_out() -> None:
    shape = shape_of(LlamaForCausalLM(SETTINGS))
    alone, many = WorkersConfig(), WorkersConfig(count=4)

    def memory(workers: WorkersConfig, **train: object) -> dict[str, int]:
        return dict(training_memory(shape, PASS, TrainConfig.model_validate(train), workers, 1 << 24, 0, 1 << 20).parts)

    one, replicated, sharded = memory(alone), memory(many), memory(many, sharding="fsdp")
    assert replicated == one | {"copies for exchange": 4 * shape.weights}
    assert sharded["optimizer"] == one["optimizer"] // 4
    outside = shape.weights - 4 * shape.layer_weights
    assert sharded["weights"] == 4 * (shape.weights // 4 + outside + 2 * shape.layer_weights)
    assert memory(alone, sharding="fsdp") == one


@pytest.mark.parametrize("bfloat16", [False, True])
def test_activations_are_those_that_a_real_model_keeps(bfloat16: bool) -> None:
    shape = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    real = LlamaForCausalLM(shape).train()
    with torch.device("meta"):
        shapes = LlamaForCausalLM(shape).train()
    weights = {weight.untyped_storage().data_ptr() for weight in real.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, 30:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=bfloat16):
        outputs = real.model(input_ids=torch.zeros(3, 40, dtype=torch.long), attention_mask=mask, use_cache=False)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert outputs.last_hidden_state.shape == (3, 40, 64)
    assert saved_bytes(shapes, 3, 40, bfloat16) == pytest.approx(measured, rel=0.05)
    shapes.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert saved_bytes(shapes, 3, 40, bfloat16) < measured / 3


@pytest.mark.parametrize(
    "student",
    [
        Student("plain", SMALL, 800, (14, 44), cut(16, 8)),
        Student("packed", SMALL, 800, (14, 44), cut(16, 8, micro_batch_tokens=250, packing=True)),
        Student("wide head", model(32, 1, 2), 8000, (8, 24), cut(8, 8)),
        Student("low", SMALL, 800, (20, 40), cut(8, 8, precision="bfloat16")),
        Student("adapters", SMALL, 800, (60, 90), cut(8, 4, gradient_checkpointing=True), lora=LoraAdapter()),
    ],
    ids=lambda student: student.name,
)
def test_a_students_tensors_are_predicted_within_15_percent(student: Student, tmp_path: Path) -> None:
    measured = run_student(student, tmp_path, profiled=True)
    examples, _ = write_world(tmp_path / "again", student.vocab_size, student.lengths)
    assert predicted_student(student, examples) == pytest.approx(measured, rel=0.15)


def test_a_chunk_is_a_blocks_copy_larger_on_a_cpu_and_twice_as_large_on_a_gpu() -> None:
    shape = shape_of(LlamaForCausalLM(SETTINGS.__class__(**{**SETTINGS.to_dict(), "vocab_size": 1 << 15})))
    assert chunk_bytes(shape, 1000, "float32", gpu=False) == 4 * (192 + 32) * (1 << 15)
    assert chunk_bytes(shape, 1000, "float32", gpu=True) == 8 * 1000 * (1 << 15)
    assert chunk_bytes(shape, 10, "float32", gpu=True) == 8 * 10 * (1 << 15)


@pytest.mark.parametrize(("vocab_size", "top_mass"), [(VOCAB, None), (70_000, None), (VOCAB, 0.5)])
def test_store_bytes_are_those_of_files(vocab_size: int, top_mass: float | None, tmp_path: Path) -> None:
    if vocab_size == VOCAB:
        _, store = scored_world(tmp_path, rows=200, top_k=16, rows_per_shard=64, top_mass=top_mass)
        lengths = [int(example.loss_mask.sum()) for example in random_examples(200, seed=0)]
        top_k, rows_per_shard = 16, 64
    else:
        examples, store = write_world(tmp_path, vocab_size, (20, 60))
        lengths = [len(examples[row].targets) for row in range(len(examples))]
        top_k, rows_per_shard = 64, len(examples)
    written = sum(path.stat().st_size for path in Path(store.place).glob("shard-*.[ar]*"))
    scores = ScoresConfig(top_k=top_k, rows_per_shard=rows_per_shard, top_mass=top_mass)
    said = store_bytes(scores, vocab_size, len(lengths), sum(lengths))
    if top_mass is None:
        assert said == pytest.approx(written, rel=0.05)
    else:
        assert written < said, "what the mass leaves out is not known before"


@pytest.mark.parametrize("classes", [5, 77])
def test_store_bytes_of_classes_are_those_of_files(classes: int, tmp_path: Path) -> None:
    rows, logprobs = labelled(np.arange(400) % classes), distributions(np.random.default_rng(0), 400, classes, 1.0)
    store = store_in(tmp_path, 400, 200, classes)
    for shard in (0, 1):
        mine = store.positions(shard)
        store.write_shard(shard, [rows[row] for row in mine], [scores_of(rows[row], logprobs[row]) for row in mine])
    written = sum(path.stat().st_size for path in Path(store.place).glob("shard-*.[ar]*"))
    said = store_bytes(ScoresConfig(top_k=classes - 1, rows_per_shard=200), classes, 400, 400, exact=True)
    assert said == pytest.approx(written, rel=0.05)
    of_rows = sum(store.shard_info(shard).row_bytes for shard in (0, 1))
    assert of_rows + 4 * 400 == 400 * (6 * classes + 6), "what docs/plan.md says, of which 4 bytes stand in the index"


def test_a_replica_on_gpus_takes_vllms_share_and_scores_beside_it() -> None:
    shape = shape_of(LlamaForCausalLM(SETTINGS))
    engine = EngineConfig(gpu=True, tensor_parallel=2, gpu_memory_utilization=0.75)
    assert weights_bytes(shape, engine) == 2 * shape.weights // 2
    assert cache_bytes(shape, engine, longest=99) == 2 * 4 * (2 * 2 * 8) * 100 // 2, (
        "keys and values of two heads of eight numbers"
    )
    assert scoring_bytes(shape, engine, 99, 50) == 1024 * 300 * (2 + 4 + 4)
    parts = replica_memory(shape, engine, 99, 50, device_bytes=1 << 30).parts
    assert parts["weights"] + parts["key-value cache"] + parts["activations"] == 0.75 * (1 << 30)


def test_the_transformers_engine_holds_logits_of_a_pass() -> None:
    shape = shape_of(LlamaForCausalLM(SETTINGS))
    engine = EngineConfig(kind="transformers", dtype="float32", rows_per_call=8)
    assert scoring_bytes(shape, engine, longest=100, targets_of_longest=60) == 300 * (8 * 100 * 4 + 60 * (4 + 4))
    assert "key-value cache" not in replica_memory(shape, engine, 100, 60).parts
    assert np.isclose(replica_memory(shape, engine, 100, 60).parts["weights"], 4 * shape.weights)


def test_vllm_on_a_cpu_keeps_its_cache_and_the_head_three_times() -> None:
    shape = shape_of(LlamaForCausalLM(SETTINGS))
    parts = replica_memory(shape, EngineConfig(dtype="float32", kv_cache_mib=3), 100, 60).parts
    assert (parts["key-value cache"], parts["copies of the head"]) == (3 << 20, 2 * 4 * 300 * 32)
    assert parts["scoring"] == 128 * 300 * (4 + 4)
