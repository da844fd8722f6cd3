"""Bytes: of a training worker at its worst moment, of a replica of the teacher, and of the store.

Tensors alone are counted; what a process holds besides, and what an allocator cannot use, stands in ``plan_cluster``. What a
decoder keeps for its backward pass is found by running it on torch's meta device: shapes without numbers.
B rows, T tokens of a row, N targets, n targets of a chunk, V vocabulary, H hidden size, K top-k.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from actors.config.models import EngineConfig, EvaluateConfig, ScoresConfig, TrainConfig
from actors.config.workers import WorkersConfig
from actors.engines.transformers import MAX_LOGITS
from actors.evaluation.metrics import LOGPROBS_AT_ONCE
from actors.models import plain_model
from losses.fused_linear import CACHED_NUMBERS, CHUNK_TARGETS, CHUNK_TARGETS_ELSEWHERE
from orchestrator.planning.shapes import ModelShape, Passes

FLOAT = 4
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
VLLM_ROWS = {"cpu": 128, "cuda": 1024}
"""Targets whose logits exist at once in a vLLM replica (``actors/engines/vllm.py``)."""
VLLM_TOKENS_A_STEP = 8192
"""Tokens vLLM takes in one step, or one row where that is longer."""
SHARD_HEADER_BYTES = 1_900
"""Of a shard's index: schema, footer and padding of the Arrow file."""
INDEX_ROW_BYTES = 16 + 8 + 4 + 8 + 8
"""Of a row in a shard's index: its key, size, checksum, the teacher's loss, and where its targets begin."""
PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, F.conv1d, F.conv2d)
"""What autocast does in 16 bits, as far as decoders and classifiers use it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device, by what they are for, at the moment when they are most."""

    parts: Mapping[str, int]
    """Bytes by purpose."""
    moment: str
    """When that is."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def training_memory(
    shape: ModelShape, passes: Passes, train: TrainConfig, workers: WorkersConfig, saved: int, recomputed: int, chunk: int
) -> Memory:
    """Return what one worker's tensors take at the worst moment of any step but the first.

    Weights, gradients and AdamW's two moments are float32. Activations are what the decoder keeps for its backward pass,
    and what flows through one block of it. The loss holds the gradient of the head and one chunk of logits. DDP keeps the
    gradients once more, in its buckets; FSDP shares weights, gradients and moments out over the workers, and gathers the
    embeddings and two blocks at a time, in the type in which they compute.

    Args:
        shape: the model, adapters included.
        passes: the largest forward pass.
        train: precision, sharding.
        workers: how many there are, and whether on GPUs.
        saved: bytes the decoder keeps for its backward pass (``saved_bytes``).
        recomputed: bytes that gradient checkpointing makes anew for one block; 0 without it.
        chunk: bytes of one chunk of logits (``chunk_bytes``).
    """
    shards = workers.count if train.sharding == "fsdp" else 1
    gathered = shape.weights - (shape.layers - 2) * shape.layer_weights if shards > 1 else 0
    trained = FLOAT * shape.trained // shards
    before = trained if passes.accumulates else 0  # gradients of the step's passes before this one
    head = FLOAT * shape.head_weights if shape.trains_head else 0
    tokens = passes.rows * passes.tokens
    states = FLOAT * 2 * passes.targets * shape.hidden_size
    flowing = FLOAT * tokens * shape.hidden_size + SIZES[train.precision] * tokens * shape.intermediate_size
    anew = max(0, recomputed - FLOAT * tokens * shape.hidden_size)  # a block's input is among what was saved
    feed_forward = shape.hidden_size * shape.intermediate_size
    largest = FLOAT * max(shape.head_weights if head else 0, feed_forward, shape.largest_matrix) // shards
    stepping = trained if workers.gpus else min(2 * largest, 2 * trained)  # AdamW: all weights at once, or one after the other
    always = {
        "weights": FLOAT * (shape.weights // shards) + SIZES[train.precision] * gathered,
        "optimizer": 2 * trained,
        "copies for exchange": trained if train.sharding == "replicate" and workers.count > 1 else 0,
    }
    of_moment = {
        "the loss": {"gradients": before + head, "activations": saved + states, "loss": chunk},
        "the backward pass of a block": {"gradients": before + head, "activations": saved + anew + flowing},
        "the end of the backward pass": {  # the head's gradient waits for the embeddings', where they are one matrix
            "gradients": trained + (head if shape.tied else 0) + (head if before else 0), "activations": flowing,
        },
        "the optimizer's step": {"gradients": trained, "optimizer": always["optimizer"] + stepping},
    }  # fmt: skip
    moments = {name: always | parts for name, parts in of_moment.items()}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory({name: count for name, count in moments[moment].items() if count}, moment)


def saved_bytes(model: PreTrainedModel, rows: int, tokens: int, bfloat16: bool) -> int:
    """Return how many bytes the decoder of a model on the meta device keeps for its backward pass, weights aside.

    Under ``bfloat16`` that includes the weights' 16-bit copies. Rows count as padded, so that attention has a mask, and
    attention as one kernel that keeps no [T, T] matrix but that mask, in its inputs' type: that of the CPU, or a
    memory-efficient one on GPUs.

    Args:
        model: on the meta device, in training mode; gradient checkpointing and adapters as it has them.
        rows: B, of the forward pass.
        tokens: T, padding included.
        bfloat16: whether the pass runs under autocast.
    """
    device = torch.device("meta")
    token_ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=device)  # as the library makes it of [B, T]
    decoder = plain_model(model).get_decoder()
    return kept_bytes(model, lambda: decoder(input_ids=token_ids, attention_mask=mask, use_cache=False), bfloat16)


def kept_bytes(model: PreTrainedModel, forward: Callable[[], Any], bfloat16: bool) -> int:
    """Return how many bytes a forward pass of a model keeps for its backward pass, the weights aside."""
    weights = [weight.untyped_storage() for weight in model.parameters()]
    known, kept = {id(storage) for storage in weights}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in known:
            kept[id(storage)] = storage  # held, so that no other storage gets its id
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _AsOnADevice(bfloat16):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


class _AsOnADevice(TorchFunctionMode):
    """Does on the meta device what real ones do and it does not: autocast's types, and attention in one kernel."""

    def __init__(self, bfloat16: bool) -> None:
        self._bfloat16 = bfloat16
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._cast(tensor) for tensor in args[:3])
            return _Attention.apply(query, key, value, kwargs.get("attn_mask"))
        if func in PRODUCTS:
            args = [self._cast(one) for one in args]
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        """Return a tensor in 16 bits; a weight's copy is made once, as autocast does."""
        if not self._bfloat16 or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(torch.bfloat16)
        return self._copies.setdefault(id(value), value.to(torch.bfloat16))


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention keeps: inputs, output, mask, and one number for each head and token."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        normalizer = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalizer, *([] if mask is None else [mask.to(query.dtype)]))
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Any:
        """Never called: nothing is learned on the meta device."""
        raise AssertionError("the activations are counted, not used")


def chunk_bytes(shape: ModelShape, targets: int, precision: str, gpu: bool) -> int:
    """Return what ``losses/fused_linear.py`` holds for one chunk of logits [n, V], the gradients of head and states aside.

    The logits in the pass's type, and of the block whose loss is computed at once one more copy in float32; under autocast
    the block's logits in float32 too, the head in 16 bits, and a chunk's product for the head's gradient.
    """
    device = "cuda" if gpu else "cpu"
    logits = min(targets, CHUNK_TARGETS.get(device, CHUNK_TARGETS_ELSEWHERE)) * shape.vocab_size
    block = logits if gpu else min(logits, max(1, CACHED_NUMBERS // shape.vocab_size) * shape.vocab_size)
    if precision == "float32":
        return FLOAT * (logits + block)
    return 2 * logits + 2 * FLOAT * block + 2 * shape.head_weights * (2 if shape.trains_head else 1)


def weights_bytes(shape: ModelShape, engine: EngineConfig) -> int:
    """Return the bytes of the teacher's weights on one device of a replica."""
    return SIZES[engine.dtype] * shape.weights // engine.tensor_parallel


def scoring_bytes(shape: ModelShape, engine: EngineConfig, longest: int, targets_of_longest: int) -> int:
    """Return the peak of scoring itself, which vLLM's own profile of the memory leaves out.

    vLLM: one chunk of logits [n, V] in the model's type, in float32, and once more for the normalizer. transformers: the
    logits of all positions of a pass, and of one row's targets in float32 and as log-probabilities.
    """
    size, device = SIZES[engine.dtype], "cuda" if engine.gpu else "cpu"
    in_float = 0 if engine.dtype == "float32" else FLOAT
    if engine.kind == "vllm":
        return VLLM_ROWS[device] * shape.vocab_size * (size + in_float + FLOAT)
    logits = rows_of_a_pass(shape, engine, longest) * longest * shape.vocab_size
    return size * logits + (size + in_float + FLOAT) * targets_of_longest * shape.vocab_size


def forward_bytes(shape: ModelShape, engine: EngineConfig, longest: int) -> int:
    """Return what a forward pass of the teacher holds on its way besides logits: of each token three states, three inner ones."""
    if engine.kind == "transformers":
        tokens = rows_of_a_pass(shape, engine, longest) * longest
    else:
        tokens = max(VLLM_TOKENS_A_STEP, longest + 1)
        tokens = tokens if engine.gpu else min(tokens, engine.rows_per_call * longest)
    inner = SIZES[engine.dtype] * 3 * shape.intermediate_size // engine.tensor_parallel
    return tokens * (FLOAT * 3 * shape.hidden_size + inner)  # norms are computed in float32


def rows_of_a_pass(shape: ModelShape, engine: EngineConfig, longest: int) -> int:
    """Return how many of the longest rows the transformers engine takes in one pass."""
    return min(engine.rows_per_call, max(1, MAX_LOGITS // (longest * shape.vocab_size)))


def cache_bytes(shape: ModelShape, engine: EngineConfig, longest: int) -> int:
    """Return the least key-value cache with which vLLM can read the longest row; transformers scores without one."""
    if engine.kind == "transformers":
        return 0
    return SIZES[engine.dtype] * shape.layers * shape.kv_size * (longest + 1) // engine.tensor_parallel


def replica_memory(
    shape: ModelShape, engine: EngineConfig, longest: int, targets_of_longest: int, device_bytes: float | None = None
) -> Memory:
    """Return what a replica takes on each of its devices.

    On a GPU vLLM takes ``gpu_memory_utilization`` of the device whatever the teacher needs, the rest of that share for its
    cache. On a CPU the cache is ``kv_cache_mib``, and embeddings and output head stay beside copies laid out for products
    (vLLM 0.32, ``dispatch_cpu_unquantized_gemm``), two of them even where both are one matrix.
    """
    weights, passing = weights_bytes(shape, engine), forward_bytes(shape, engine, longest)
    cache = cache_bytes(shape, engine, longest)
    copies = 0
    if engine.kind == "vllm" and not engine.gpu:
        cache, copies = engine.kv_cache_mib << 20, 2 * SIZES[engine.dtype] * shape.head_weights
    elif engine.kind == "vllm" and device_bytes is not None:
        cache = max(cache, int(engine.gpu_memory_utilization * device_bytes) - weights - passing)
    parts = {
        "weights": weights,
        "copies of the head": copies, "key-value cache": cache, "activations": passing,
        "scoring": scoring_bytes(shape, engine, longest, targets_of_longest),
    }  # fmt: skip
    return Memory({name: count for name, count in parts.items() if count}, "scoring")


def sampler_memory(shape: ModelShape, engine: EngineConfig, longest: int, device_bytes: float | None = None) -> Memory:
    """Return what a sampler takes on each of its devices: what a replica does, but for the logits.

    vLLM draws a token for each of ``rows_per_call`` texts at a time, from their logits [rows, V] in its type and twice in
    float32; transformers writes one text after the other, and computes the logits of its last token alone.
    """
    parts = dict(replica_memory(shape, engine, longest, 0, device_bytes).parts)
    rows, in_float = (engine.rows_per_call if engine.kind == "vllm" else 1), 2 * FLOAT
    parts["scoring"] = rows * shape.vocab_size * (SIZES[engine.dtype] + in_float)
    return Memory({"logits" if name == "scoring" else name: count for name, count in parts.items()}, "sampling")


def evaluator_memory(shape: ModelShape, evaluate: EvaluateConfig, longest: int) -> Memory:
    """Return what an evaluator takes on its device: one model, and a forward pass over the longest rows."""
    number = 2 if evaluate.precision == "bfloat16" else 4
    rows = evaluate.batch_rows * longest
    parts = {
        "weights": number * shape.weights,
        "logits of the longest rows": number * rows * shape.vocab_size,
        "their log-probabilities": 8 * min(LOGPROBS_AT_ONCE, rows * shape.vocab_size),
    }
    return Memory(parts, "while the longest rows are predicted")


def store_bytes(scores: ScoresConfig, vocab_size: int, rows: int, targets: int, *, exact: bool = False) -> int:
    """Return the bytes of a store's shards, as ``actors/score_store/encoding.py`` writes them; with ``top_mass`` at most.

    Args:
        scores: K, and the rows of a shard.
        vocab_size: V, or the number of classes.
        rows: of the store.
        targets: of them.
        exact: whether log-probabilities of the top-K are float32, as those of classes are.
    """
    ids, logprob = 2 if vocab_size <= 1 << 16 else 3, FLOAT if exact else 2
    ragged = scores.top_mass is not None
    a_target = scores.top_k * (logprob + ids) + 3 * FLOAT + (2 if ragged else 0)
    shards = -(-rows // scores.rows_per_shard)
    return targets * a_target + rows * INDEX_ROW_BYTES + shards * SHARD_HEADER_BYTES
