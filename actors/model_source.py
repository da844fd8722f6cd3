"""Where a model is loaded from. Imports nothing heavy: whoever names a model need not load it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is loaded from: a folder or a hub name."""

    name: str
    """Path or hub name."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    attention: str = "auto"
    """How transformers computes its attention."""
    classes: int = 0
    """How many labels it tells apart, if it is a classifier; 0 for a causal language model."""

    def require_safetensors(self) -> None:
        """Raise if a folder has weights in other formats alone: those are pickles, which can run code.

        Raises:
            ValueError: naming the folder and what would do.
        """
        folder = Path(self.name)
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"the model's folder {folder} holds no *.safetensors, and weights of other kinds are not read; a copy made by "
                "transformers' save_pretrained would do"
            )
