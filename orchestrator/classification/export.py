"""The exported folder of a classifier, loaded once as any user would load it."""

from pathlib import Path

import numpy as np
import torch

from actors.dataloader.class_rows import row_logits
from actors.dataloader.collator import collate
from actors.dataloader.scored_rows import FileRows
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.models import load_model


@torch.inference_mode()
def check_classifier(source: ModelSource, heldout: Path) -> None:
    """Load a classifier and have it predict the first held-out row.

    Raises:
        ValueError: if its logits are not finite.
    """
    batch = collate(FileRows(ExampleFile(heldout), None, 0, np.arange(1)), [0], source.classes)
    if not row_logits(load_model(source).eval(), batch).isfinite().all():
        raise ValueError(f"the model in {source.name} gives logits that are not finite; its training diverged")
