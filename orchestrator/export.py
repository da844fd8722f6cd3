"""The export stage: the student's folder gets a model card, and is loaded once as any user would load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.config import ModelConfig
from actors.examples import write_atomically
from actors.identity import Identity, identity_hash
from actors.score_store import ScoreStore
from orchestrator.config import RunConfig
from orchestrator.models import Models
from orchestrator.run_dir import Facts, RunDir
from orchestrator.table import ComparisonTable, markdown, read_table

CARD_SECTIONS = ("name", "seed", "data", "teacher", "student", "loss", "train", "scores")


def export(config: RunConfig, books: RunDir, models: Models, training_store: ScoreStore | None) -> Facts:
    """Write the model card into the student's folder and check that the folder loads and generates."""
    folder = models.student_folder
    identity = training_store.identity if training_store is not None else None
    write_model_card(folder, config, identity, read_table(books.path))
    check_export(folder, trust_remote_code=models.distilled().trust_remote_code)
    return {"folder": str(folder)}


def write_model_card(folder: Path, config: RunConfig, score_identity: Identity | None, table: ComparisonTable) -> None:
    """Write ``README.md``: what the model is, its numbers, the scores and the configuration it was made with.

    Args:
        folder: of the student.
        config: of the run.
        score_identity: of the store the student learned from; None if its loss needed no teacher.
        table: teacher, student before and student after.
    """
    write_atomically(folder / "README.md", model_card(config, score_identity, table).encode())


def model_card(config: RunConfig, score_identity: Identity | None, table: ComparisonTable) -> str:
    """Return the model card as Markdown with YAML front matter. The licence is left to the user, and said to be."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name in CARD_SECTIONS}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front_matter(config), sort_keys=False, allow_unicode=True).strip(),
            "---",
            f"# {config.name}",
            "",
            f"A causal language model{_begun_from(config.student.model)}, trained by run `{config.name}` with the teaching "
            f"`{config.loss.teaching}`" + (f" from the teacher {_described(config.teacher.model)}." if score_identity else "."),
            "It was made with [adaptive teaching](https://arxiv.org/abs/2402.11890) software, which also wrote this card.",
            "",
            "No licence is stated here: it depends on those of teacher, student and data. Add `license` above before publishing.",
            "",
            "## Results on held-out rows",
            "",
            markdown(table),
            "Cross entropy and KL are natural logarithms; KL is from the teacher to the model, over the target, the teacher's "
            f"{config.scores.top_k} most likely others and one class for all the rest.",
            "",
            "## Scores it learned from",
            "",
            _scores_part(score_identity),
            "## Configuration",
            "",
            "```yaml",
            yaml.safe_dump(without_places(settings), sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
        ]
    )


def front_matter(config: RunConfig) -> dict[str, Any]:
    """Return the card's metadata; ``base_model`` only where the student began as a model that others can name."""
    matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", config.loss.teaching],
    }
    model = config.student.model
    if model.kind == "pretrained" and not _is_place(model.name) and not Path(model.name).is_dir():
        matter["base_model"] = model.name
    return matter


def check_export(folder: Path, trust_remote_code: bool = False) -> None:
    """Load the folder as an ordinary Hugging Face model and let it generate one token.

    Raises:
        ValueError: if it holds adapters instead of whole weights, the tokenizer has ids that the model has not, or the
            model's logits are not finite.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds LoRA adapters, not a whole model; merge them before export")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust_remote_code, use_safetensors=True, dtype="auto"
    )
    vocab_size = model.get_output_embeddings().weight.shape[0]
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model predicts {vocab_size}; "
            "save the tokenizer that it was trained with"
        )
    prompt = torch.tensor([tokenizer("1")["input_ids"] or [0]])
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=1, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    if not generated.logits[0].isfinite().any() or generated.logits[0].isnan().any():
        raise ValueError(f"the model in {folder} gives logits that are not finite; its training diverged")


def without_places(value: Any) -> Any:
    """Return a dumped configuration in which a file or folder of this machine is named by its last part alone."""
    if isinstance(value, Mapping):
        return {name: without_places(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and _is_place(value) else value


def _is_place(name: str) -> bool:
    return name.startswith(("/", "~", "./", "../"))


def _begun_from(model: ModelConfig) -> str:
    return f" that began as {_described(model)}" if model.kind == "pretrained" else " that began with random weights"


def _described(model: ModelConfig) -> str:
    if model.kind == "scratch":
        return f"`{model.layers} layers of width {model.hidden_size}, made for this run`"
    return f"`{without_places(model.name)}`" + (f" at `{model.revision}`" if model.revision else "")


def _scores_part(identity: Identity | None) -> str:
    if identity is None:
        return "None: its loss is the cross entropy to the data alone.\n"
    return (
        f"Identity `{identity_hash(identity)}`, which stands for:\n\n```json\n"
        f"{json.dumps(without_places(identity), indent=1, ensure_ascii=False)}\n```\n"
    )
