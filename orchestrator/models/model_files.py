"""What a model's files say before it is loaded: a whole model, an adapter, or something that is not read; and its type."""

import json
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

from actors.model_source import ModelSource

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The names of types in safetensors files, and ours."""

NOT_READ = {
    ".gguf": "GGUF", ".bin": "pickle", ".pt": "pickle", ".pth": "pickle", ".ckpt": "pickle", ".safetensors": "safetensors",
}  # fmt: skip


def base_of_adapter(folder: Path, key: str) -> ModelSource | None:
    """Return the model for which the adapter in a folder was made; None where the folder holds a whole model, or is none.

    Raises:
        ValueError: naming the key, if ``folder`` is a file, holds weights in formats that are not read, or an adapter that
            does not name its base.
    """
    require_model_folder(folder, key)
    settings = folder / "adapter_config.json"
    if not settings.is_file() or (folder / "config.json").is_file():
        return None
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
        base = content["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{key} {folder}: its adapter_config.json cannot be read: {error!r}") from error
    if not base:
        raise ValueError(
            f"{key} {folder} holds an adapter whose adapter_config.json names no base_model_name_or_path; write the base's name "
            "there, or merge the adapter (peft: merge_and_unload, save_pretrained) and name the folder of the merged model"
        )
    local = Path(base).expanduser()
    if not local.is_absolute() and not local.is_dir() and (folder / base).is_dir():
        local = folder / base
    return ModelSource(str(local.resolve()) if local.is_dir() else base, content.get("revision"))


def require_model_folder(path: Path, key: str) -> None:
    """Raise if a model's path is a file, or a folder without safetensors.

    Raises:
        ValueError: naming the key, the file and the way to a folder that is.
    """
    if path.is_file() or (path.suffix in NOT_READ and not path.is_dir()):
        kind = NOT_READ.get(path.suffix, "unknown")
        raise ValueError(f"{key} {path} is one file ({kind}), and a model is a folder, or a name on the hub; {_way_out(path)}")
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return
    if ggufs := sorted(path.glob("*.gguf")):
        raise ValueError(f"{key} {path} holds GGUF weights alone, which are quantized for other programs; {_way_out(ggufs[0])}")


def stored_dtype(source: ModelSource) -> str:
    """Return the type of a model's stored weights: float32, bfloat16 or float16; float32 where they have another."""
    folder = Path(source.name)
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with safe_open(path, framework="pt") as file:
            found = {DTYPES.get(file.get_slice(name).get_dtype()) for name in file.keys()} - {None}  # noqa: SIM118
        if found:
            return "float32" if "float32" in found else str(sorted(map(str, found))[0])
    config = AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=source.trust_remote_code)
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return dtype if dtype in DTYPES.values() else "float32"


def _way_out(path: Path) -> str:
    if path.suffix == ".gguf":
        return (
            f"transformers writes safetensors from it: AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, "
            f"gguf_file={path.name!r}).save_pretrained('a/folder'), and the same for AutoTokenizer; better, name the model "
            "that the GGUF file was made from"
        )
    return "the folder that transformers' save_pretrained has written would do"
