"""Students of some of the teacher's layers: which are kept, and what is left of configuration and model without the others.

As in DistilBERT (arXiv 1910.01108), Minitron (arXiv 2407.14679) and ShortGPT (arXiv 2403.03853). Layers are counted from 0. What
can be cut is not a list of names: blocks must be one list, and the kept ones the same when the smaller configuration builds them.
"""

import copy
import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from actors.config.model_kinds import CutModel

PER_LAYER = re.compile("layer|block|pattern")
"""In the names of config.json's lists that have an entry a layer, such as ``layer_types``."""
POSITION = "layer_idx"
"""Where a module keeps the position of its block, by which the key-value cache is found."""


def named_layers(cut: CutModel, layers: int) -> tuple[int, ...]:
    """Return the layers that are kept of a teacher's; evenly spaced ones where the choice waits for a measurement.

    Raises:
        ValueError: if the teacher has not those layers, or none besides.
    """
    cut.require_fewer_than(layers)
    if not isinstance(cut.layers, int):
        return cut.layers
    return first_and_last(layers, cut.layers) if cut.choose == "first_and_last" else evenly(layers, cut.layers)


def evenly(layers: int, count: int) -> tuple[int, ...]:
    """Return ``count`` of so many layers at equal distances, the first and the last among them; of one, the first."""
    gaps = max(count - 1, 1)
    return tuple((2 * place * (layers - 1) + gaps) // (2 * gaps) for place in range(count))


def first_and_last(layers: int, count: int) -> tuple[int, ...]:
    """Return the first half of ``count`` layers from the front, one more if it is odd, and the others from the end."""
    front = (count + 1) // 2
    return (*range(front), *range(layers - count + front, layers))


def most_influential(influences: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the ``count`` layers of the largest influence, in the model's order; of equal ones the earlier."""
    ranked = sorted(range(len(influences)), key=lambda layer: (-influences[layer], layer))
    return tuple(sorted(ranked[:count]))


def layers_of(settings: PreTrainedConfig) -> int:
    """Return how many layers a teacher has.

    Raises:
        ValueError: if it is no decoder whose layers can be counted, or its weights are quantized.
    """
    if settings.is_encoder_decoder:
        raise _refusal(settings, "it has an encoder too, and a decoder alone can be cut")
    if getattr(settings, "quantization_config", None) is not None:
        raise _refusal(settings, "its weights are quantized; teacher.model.name of the model before quantization would do")
    layers = getattr(settings.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise _refusal(settings, f"its config.json has num_hidden_layers {layers!r}, which is no number")
    return layers


def cut_settings(settings: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """Return the configuration of a model with the kept layers alone: a copy."""
    smaller = copy.deepcopy(settings)
    _cut_in_place(smaller, kept)
    return smaller


def require_same_blocks(settings: PreTrainedConfig, kept: Sequence[int], trust_remote_code: bool = False) -> None:
    """Raise if a model cannot be cut so: the smaller configuration must build each kept block as it was. Needs no weights.

    Compared are the modules of each block, the shapes of their weights, and the numbers and words that they were made with, such
    as the width of a sliding window; and the shapes of all that is not in a block.

    Raises:
        ValueError: naming the model's class, what stands against it and what would do.
    """
    try:
        with torch.device("meta"):
            whole, smaller = (
                AutoModelForCausalLM.from_config(one, trust_remote_code=trust_remote_code)
                for one in (settings, cut_settings(settings, kept))
            )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _refusal(settings, f"transformers builds no smaller causal language model from it ({reason})") from error
    blocks, smaller_blocks = blocks_of(whole), blocks_of(smaller)
    for position, layer in enumerate(kept):
        if differing := next(_differences(blocks[layer], smaller_blocks[position]), None):
            raise _refusal(
                settings, f"its layer {layer} would be another as layer {position}, since what it does depends on its place "
                f"({differing})"
            )  # fmt: skip
    if _shapes_outside(whole, blocks) != _shapes_outside(smaller, smaller_blocks):
        raise _refusal(settings, "weights outside of its layers depend on how many there are")


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a decoder that has one list of them.

    Raises:
        ValueError: naming the model's class, if it has another layout.
    """
    return _list_of_blocks(model)[2]


def cut_model(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Take all but the kept layers out of a model; they still know the positions that they had, and compute no cache rightly."""
    decoder, name, blocks = _list_of_blocks(model)
    setattr(decoder, name, nn.ModuleList(blocks[layer] for layer in kept))
    _cut_in_place(model.config, kept)


def renumber(model: PreTrainedModel) -> None:
    """Give the blocks of a cut model the positions that they have now."""
    for position, block in enumerate(blocks_of(model)):
        for module in block.modules():
            if isinstance(getattr(module, POSITION, None), int):
                setattr(module, POSITION, position)


def _list_of_blocks(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    decoder = model.get_decoder()
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    if len(lists) != 1:
        found = f"lists of modules: {', '.join(lists)}" if lists else "no list of layers"
        raise _refusal(model.config, f"its {type(decoder).__name__} has {found}, and one list of layers can be cut")
    ((name, blocks),) = lists.items()
    if len(blocks) != (stated := model.config.get_text_config().num_hidden_layers):
        raise _refusal(model.config, f"its {name} are {len(blocks)}, and num_hidden_layers is {stated}")
    return decoder, name, blocks


def _cut_in_place(settings: PreTrainedConfig, kept: Sequence[int]) -> None:
    text = settings.get_text_config()
    layers = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == layers and PER_LAYER.search(name):
            setattr(text, name, [value[layer] for layer in kept])
    text.num_hidden_layers = len(kept)


def _differences(block: nn.Module, again: nn.Module) -> Iterator[str]:
    """Yield in words what differs between two blocks."""
    modules, others = dict(block.named_modules()), dict(again.named_modules())
    for name in sorted({*modules} ^ {*others}):
        yield f"it has {name}" if name in modules else f"it has no {name}"
    for name in [name for name in modules if name in others]:
        ours, theirs = _made_of(modules[name]), _made_of(others[name])
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                yield f"{f'{name}.{key}'.removeprefix('.')} {ours.get(key)}, not {theirs.get(key)}"


def _made_of(module: nn.Module) -> dict[str, object]:
    """Return what a module was made with, without its position and what it is made of."""
    plain = (int, float, str, tuple)
    said = {name: value for name, value in vars(module).items() if isinstance(value, plain) and not name.startswith("_")}
    said.pop(POSITION, None)
    weights = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {"class": type(module).__name__, **said, **{name: tuple(weight.shape) for name, weight in weights}}


def _shapes_outside(model: PreTrainedModel, blocks: nn.ModuleList) -> dict[str, tuple[int, ...]]:
    inside = {id(weight) for weight in blocks.parameters()}
    return {name: tuple(weight.shape) for name, weight in model.named_parameters() if id(weight) not in inside}


def _refusal(settings: PreTrainedConfig, reason: str) -> ValueError:
    name = (getattr(settings, "architectures", None) or [type(settings).__name__])[0]
    return ValueError(
        f"student.model.kind is cut, and the teacher, a {name}, cannot be: {reason}; student.model.kind=pretrained or scratch "
        "would do"
    )
