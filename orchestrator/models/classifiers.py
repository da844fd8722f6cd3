"""The classifiers of a run: drawn from a shape, given a head of the run's labels, and checked against them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase

from actors.config.model_kinds import PretrainedModel
from actors.config.networks import SoftLabels
from actors.models import save_model
from actors.networks.classifier import SmallClassifier, SmallClassifierConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.models.models import ROLES, Models, Role, config_of

OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
"""Kinds of models whose positions begin behind that of the padding."""


def label_names(task: ClassificationTask) -> dict[int, str]:
    """Return the labels as ``config.json`` has them."""
    return {index: str(label) for index, label in enumerate(task.labels)}


def make_classifiers(
    models: Models, task: ClassificationTask, tokenizers: Mapping[Role, PreTrainedTokenizerBase | None],
    image_shape: tuple[int, ...],
) -> list[str]:  # fmt: skip
    """Draw the weights of networks, and give pretrained models without a head of the run's labels one; return remarks.

    Args:
        models: of the run.
        task: with the labels.
        tokenizers: of the roles whose models are made; None for images.
        image_shape: of the images; empty for texts.

    Raises:
        ValueError: if a pretrained classifier has other labels.
    """
    remarks = []
    for seed, role in enumerate(ROLES, start=models.config.seed):
        shape, folder = models.side(role).model, Path(models.made(role).name)
        if role not in tokenizers or isinstance(shape, SoftLabels) or folder.exists() or not models.classes_of(role):
            continue
        torch.manual_seed(seed)
        tokenizer = tokenizers[role]
        if isinstance(shape, PretrainedModel):
            if has_own_head(models, role, task):
                continue
            source = models.named(role)
            model = AutoModelForSequenceClassification.from_pretrained(
                source.name, revision=source.revision, trust_remote_code=source.trust_remote_code, use_safetensors=True,
                num_labels=len(task.labels), ignore_mismatched_sizes=True, dtype=torch.float32,
            )  # fmt: skip
            remarks.append(f"{role}: {source.name} has no head for these labels and gets a new one, which knows nothing yet")
            if model.config.pad_token_id is None and tokenizer is not None:
                model.config.pad_token_id = tokenizer.pad_token_id
        else:
            settings = SmallClassifierConfig(
                network=shape.model_dump(mode="json"), num_labels=len(task.labels), image_shape=image_shape,
                vocab_size=0 if tokenizer is None else len(tokenizer),
                pad_token_id=None if tokenizer is None else tokenizer.pad_token_id,
            )  # fmt: skip
            model = SmallClassifier(settings)
        model.config.id2label = label_names(task)
        model.config.label2id = {name: index for index, name in label_names(task).items()}
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, tokenizer, folder)
    return remarks


def has_own_head(models: Models, role: Role, task: ClassificationTask) -> bool:
    """Whether a pretrained model is a classifier of the run's labels.

    Raises:
        ValueError: if it is a classifier of others, or of the same in another order.
    """
    settings, key = config_of(models.named(role), f"{role}.model.name"), f"{role}.model.name"
    kinds = settings.architectures or []
    if not any(kind.endswith("ForSequenceClassification") or kind == SmallClassifier.__name__ for kind in kinds):
        return False
    theirs = [str(settings.id2label[index]) for index in range(settings.num_labels)]
    ours = list(label_names(task).values())
    unnamed = [f"LABEL_{index}" for index in range(settings.num_labels)]
    if theirs == ours or (theirs == unnamed and len(ours) == len(theirs)):
        return True
    if sorted(theirs) == sorted(ours):
        raise ValueError(f"task.labels {ours} are those of {key} {models.named(role).name!r} in another order; {theirs} would do")
    missing = [label for label in ours if label not in theirs]
    what = f"has no label {missing[0]!r}" if missing else f"has {len(theirs)} labels, not {len(ours)}"
    raise ValueError(
        f"{key} {models.named(role).name!r} {what}; its labels are {', '.join(theirs)}: a model without a classification head "
        "would do, or task.labels of these"
    )


def window_of_classifier(settings: PreTrainedConfig) -> int | None:
    """Return how many tokens a classifier reads at most; None where nothing limits them."""
    window: int | None = getattr(settings, "max_position_embeddings", None)
    if window is not None and window < 0:  # XLNet's way to say that nothing does
        return None
    if window is not None and settings.model_type in OFFSET_POSITIONS:
        window -= settings.pad_token_id + 1
    return window


def require_windows(models: Models, longest: dict[Role, int]) -> None:
    """Raise if a pretrained classifier knows fewer positions than a row has.

    Args:
        models: of the run.
        longest: tokens of the longest row as each role reads it, without its label.
    """
    for role in ROLES:
        if not isinstance(models.side(role).model, PretrainedModel) or not models.classes_of(role):
            continue
        settings = config_of(models.named(role), f"{role}.model.name")
        window = window_of_classifier(settings)
        if window is not None and longest[role] > window:
            raise ValueError(
                f"the longest row has {longest[role]} tokens, and {role}.model.name {models.named(role).name!r} reads {window}; "
                f"data.max_tokens={window + 1} would do, of which one is the label"
            )
