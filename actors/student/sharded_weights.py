"""The weights of a sharded student: each worker reads its share of them from the files, so that none ever holds them whole."""

from collections import Counter
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.attention import attention_for
from actors.lora import plain_name
from actors.model_source import ModelSource
from actors.models import weights_folder


def model_without_weights(source: ModelSource) -> PreTrainedModel | None:
    """Return a float32 model on the CPU whose weights are still to be read: memory that nobody has written to takes no room.

    None where the files hold other names or shapes than the model has, so that transformers has to convert what they hold.
    """
    source.require_safetensors()
    config = AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=source.trust_remote_code)
    with init_empty_weights(include_buffers=False):  # buffers that are not stored, as rotary frequencies, are made here alone
        model = AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=source.trust_remote_code,
            dtype=torch.float32,
            attn_implementation=attention_for(config, source.attention),
        )
    buffers = dict(model.named_buffers())
    model.to_empty(device="cpu")
    for name, buffer in buffers.items():
        model.get_buffer(name).copy_(buffer)
    model.tie_weights()
    found = _stored_shapes(weights_folder(source))
    fits = all(found.get(name) == tuple(weight.shape) for name, weight in _stored_tensors(model).items())
    return model if fits else None


def read_shares(student: nn.Module, source: ModelSource) -> None:
    """Read each worker's share of the weights, the adapters' aside; all workers call it together.

    Args:
        student: sharded, made by ``model_without_weights``.
        source: of the same model.
    """
    model = getattr(student, "model", student)
    tensors = {plain_name(name): tensor.detach() for name, tensor in _stored_tensors(model).items() if ".lora_" not in name}
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(weights_folder(source))))


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the buffers that are stored, those of two names by the first."""
    stored = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if name in stored}


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a folder's files, but of names that several files have."""
    shapes, times = {}, Counter[str]()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
                times[name] += 1
    return {name: shape for name, shape in shapes.items() if times[name] == 1}
