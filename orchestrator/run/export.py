"""The export stage: the student's folder gets a model card, and is loaded once as any user would load it."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.config.model_kinds import PretrainedModel, ScratchModel, TeacherModel
from actors.config.networks import SoftLabels
from actors.config.places import in_object_storage
from actors.evaluation.answer_ends import read_answer_ends
from actors.evaluation.benchmark_figures import BenchmarkFigure, BenchmarkResult
from actors.files import write_atomically
from actors.format import plural
from actors.score_store.identity import Identity, identity_hash
from actors.score_store.store import ScoreStore
from actors.student.finished_model import ExportProof, read_proof
from orchestrator.classification.export import check_classifier
from orchestrator.config.classes import is_of_images
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.models.models import Models
from orchestrator.run.results_table import ComparisonTable, markdown, read_table
from orchestrator.run.run_dir import Facts, RunDir

logger = logging.getLogger("atkd")

CARD = "README.md"
RESULTS, AFTER_RESULTS = "## Results on held-out rows", "Cross entropy and KL are"
"""Between these stands the table in a card."""
HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"
CARD_SECTIONS = ("name", "seed", "data", "teacher", "student", "loss", "train", "scores", "export")


def export(
    config: RunConfig, run_dir: RunDir, models: Models, training_store: ScoreStore | None,
    benchmarks: Sequence[BenchmarkResult] = (),
) -> Facts:  # fmt: skip
    """Write the model card into the student's folder and check that the folder loads, stops and generates as it should."""
    folder = models.student_folder
    if config.classes:
        return export_classifier(config, run_dir, models, training_store)
    identity = training_store.identity if training_store is not None else None
    tokenizer = models.tokenizer()
    ends, proof = read_answer_ends(models.tokenizer_folder, tokenizer), read_proof(export_proof_path(run_dir.path))
    stored = StoredStudent(models.export_dtype(), [f"{tokenizer.convert_ids_to_tokens(end)} ({end})" for end in ends], proof)
    write_model_card(folder, config, identity, read_table(run_dir.path), stored, benchmarks)
    remarks = check_export(folder, ends, stored.dtype, trust_remote_code=models.distilled().trust_remote_code)
    for line in [*stored.lines(), *remarks]:
        logger.info(f"export: {line}")
    return {"folder": str(folder), "dtype": stored.dtype, "answer_ends": list(ends)}


def export_classifier(config: RunConfig, run_dir: RunDir, models: Models, training_store: ScoreStore | None) -> Facts:
    """Write the model card into a classifier's folder and check that the folder loads and predicts."""
    folder, identity = models.student_folder, training_store.identity if training_store is not None else None
    stored = StoredStudent(models.export_dtype(), [], read_proof(export_proof_path(run_dir.path)))
    write_model_card(folder, config, identity, read_table(run_dir.path), stored)
    check_classifier(models.distilled(), run_dir.path / "data" / "heldout.arrow")
    for line in stored.lines():
        logger.info(f"export: {line}")
    return {"folder": str(folder), "dtype": stored.dtype}


def export_proof_path(run: Path) -> Path:
    """Return the file in a run's folder that holds the proof of its student."""
    return run / "metrics" / "train_export.json"


@dataclass(frozen=True, slots=True)
class StoredStudent:
    """How the student's folder holds the student."""

    dtype: str
    """Type of its weights."""
    ends: list[str]
    """The tokens at which its answers end, as text and id."""
    proof: ExportProof | None
    """How near it is to the student that was trained."""

    def lines(self) -> list[str]:
        """Return it in sentences."""
        lines = [f"weights are stored in {self.dtype}"]
        if self.ends:
            lines.append(f"answers end at {' or '.join(self.ends)}, as generation_config.json says")
        if self.proof is not None:
            lines.append(
                f"on {self.proof.tokens} tokens the stored student is {self.proof.kl_of_export:.1e} nats from the trained one "
                "(KL a token)"
            )
            if self.proof.untied:
                lines.append(f"untied, since only one of two layers had an adapter: {', '.join(self.proof.untied)}")
        return lines


def write_model_card(
    folder: Path, config: RunConfig, score_identity: Identity | None, table: ComparisonTable,
    stored: StoredStudent | None = None, benchmarks: Sequence[BenchmarkResult] = (),
) -> None:  # fmt: skip
    """Write ``README.md``: what the model is, its numbers, the scores and the configuration it was made with.

    Args:
        folder: of the student.
        config: of the run.
        score_identity: of the store the student learned from; None if its loss needed no teacher.
        table: teacher, student before and student after.
        stored: how the folder holds the student.
        benchmarks: of the student after.
    """
    write_atomically(folder / CARD, model_card(config, score_identity, table, stored, benchmarks).encode())


def model_card(
    config: RunConfig, score_identity: Identity | None, table: ComparisonTable, stored: StoredStudent | None = None,
    benchmarks: Sequence[BenchmarkResult] = (),
) -> str:  # fmt: skip
    """Return the model card as Markdown with YAML front matter. The licence is left to the user, and said to be."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name in CARD_SECTIONS}
    return "\n".join(
        [
            "---",
            _yaml(front_matter(config) | model_index(config.name, benchmarks)),
            "---",
            f"# {config.name}",
            "",
            f"{_kind_of(config)}{_begun_from(config)}, trained by run `{config.name}` with the loss "
            f"`{config.loss.kind}`" + (f" from the teacher {_described(config.teacher.model)}." if score_identity else "."),
            "It was made with [adaptive teaching](https://arxiv.org/abs/2402.11890) software, which also wrote this card.",
            "",
            "No licence is stated here: it depends on those of teacher, student and data. Add `license` above before publishing.",
            "",
            RESULTS,
            "",
            markdown(table),
            f"{AFTER_RESULTS} natural logarithms; KL is from the teacher to the model, over the target, the teacher's "
            f"{config.scores.top_k} most likely others and one class for all the rest.",
            "",
            *_stored_part(stored),
            "## Scores it learned from",
            "",
            _scores_part(score_identity),
            "## Configuration",
            "",
            "```yaml",
            _yaml(without_places(settings)),
            "```",
            "",
        ]
    )


def front_matter(config: RunConfig) -> dict[str, Any]:
    """Return the card's metadata; ``base_model`` only where the student began as a model that others can name."""
    matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _pipeline_of(config),
        "tags": ["knowledge-distillation", config.loss.kind],
    }
    model = config.teacher.model if config.student.model.kind == "cut" else config.student.model
    if model.kind == "pretrained" and not _is_place(model.name) and not Path(model.name).is_dir():
        matter["base_model"] = model.name
    return matter


def model_index(name: str, benchmarks: Sequence[BenchmarkResult]) -> dict[str, Any]:
    """Return the card's entry ``model-index``, by which the hub shows figures; nothing where none were measured."""
    results = [_eval_result(figure, result.harness) for result in benchmarks for figure in result.figures]
    return {"model-index": eval_results_to_model_index(name, results)} if results else {}


def _eval_result(figure: BenchmarkFigure, harness: str) -> EvalResult:
    details = {"standard_error": figure.stderr, "rows": figure.rows, "task_version": figure.version, "harness_version": harness}
    return EvalResult(
        task_type="text-generation", task_name=figure.task, dataset_type=without_places(figure.dataset or figure.task),
        dataset_name=figure.task, dataset_config=figure.dataset_config, dataset_args={"num_few_shot": figure.shots},
        metric_type=figure.metric, metric_name=f"{figure.task}: {figure.name}", metric_value=figure.value,
        metric_args={key: value for key, value in details.items() if value is not None},
        source_name="lm-evaluation-harness", source_url=HARNESS,
    )  # fmt: skip


def renew_card(folder: Path, name: str, table: ComparisonTable, benchmarks: Sequence[BenchmarkResult]) -> bool:
    """Put other figures into a model card that stands already; whatever its owner wrote into it stays.

    Args:
        folder: of the student.
        name: of the run.
        table: what takes the place of the card's own.
        benchmarks: of the student after.

    Returns:
        Whether the card was as cards are written, so that it could be done.
    """
    path = folder / CARD
    parts = path.read_text(encoding="utf-8").split("---\n", 2) if path.exists() else []
    if len(parts) != 3 or parts[0] or RESULTS not in parts[2] or AFTER_RESULTS not in parts[2]:
        return False
    before, _, rest = parts[2].partition(RESULTS)
    after = rest[rest.index(AFTER_RESULTS) :]
    matter = yaml.safe_load(parts[1]) | model_index(name, benchmarks)
    card = f"---\n{_yaml(matter)}\n---\n{before}{RESULTS}\n\n{markdown(table)}\n{after}"
    write_atomically(path, card.encode())
    return True


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()


def check_export(
    folder: Path, ends: tuple[int, ...] | None = None, dtype: str | None = None, trust_remote_code: bool = False
) -> list[str]:
    """Load the folder as an ordinary Hugging Face model and let it generate one token; return what else is to be known.

    Args:
        folder: of the student.
        ends: token ids at which its answers must end; None where any will do.
        dtype: type that its weights must have; None where any will do.
        trust_remote_code: whether code that came with the model may be run.

    Raises:
        ValueError: if it holds adapters instead of whole weights, ends answers elsewhere, is stored in another type, or gives
            logits that are not finite.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds LoRA adapters, not a whole model; merge them before export")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, use_safetensors=True, dtype="auto")
    found_dtype, found_ends = str(model.dtype).removeprefix("torch."), model.generation_config.eos_token_id
    if dtype is not None and found_dtype != dtype:
        raise ValueError(f"the model in {folder} is stored in {found_dtype}, and {dtype} was asked for (export.dtype)")
    if ends is not None and found_ends != list(ends):
        raise ValueError(f"generation_config.json in {folder} ends answers at {found_ends}, evaluation did at {list(ends)}")
    vocab_size = model.get_output_embeddings().weight.shape[0]
    prompt = torch.tensor([tokenizer("1")["input_ids"] or [0]])
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=1, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    if not generated.logits[0].isfinite().any() or generated.logits[0].isnan().any():
        raise ValueError(f"the model in {folder} gives logits that are not finite; its training diverged")
    if len(tokenizer) <= vocab_size:
        return []
    return [
        f"the tokenizer has {len(tokenizer)} tokens and the model {vocab_size}, as the models that it was made from: none of the "
        "others stood in a row, and a prompt with one of them cannot be answered"
    ]


def without_places(value: Any) -> Any:
    """Return a dumped configuration in which a file or folder of this machine is named by its last part alone."""
    if isinstance(value, Mapping):
        return {name: without_places(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and _is_place(value) else value


def _is_place(name: str) -> bool:
    return in_object_storage(name) or name.startswith(("/", "~", "./", "../"))


def _pipeline_of(config: RunConfig) -> str:
    if not config.classes:
        return "text-generation"
    return "image-classification" if is_of_images(config.data) else "text-classification"


def _kind_of(config: RunConfig) -> str:
    if not isinstance(config.task, ClassificationTask):
        return "A causal language model"
    return f"A classifier of {plural(config.classes, 'label')} ({', '.join(map(str, config.task.labels))})"


def _begun_from(config: RunConfig) -> str:
    model = config.student.model
    if model.kind == "cut":
        return f" that began as {plural(model.count, 'layer')} of the teacher {_described(config.teacher.model)}"
    return f" that began as {_described(model)}" if model.kind == "pretrained" else " that began with random weights"


def _described(model: TeacherModel) -> str:
    if isinstance(model, SoftLabels):
        return f"`one distribution for each label, by {model.similarity}`"
    if not isinstance(model, PretrainedModel | ScratchModel):
        return f"`{model.kind}, made for this run`"
    if model.kind == "scratch":
        return f"`{model.layers} layers of width {model.hidden_size}, made for this run`"
    return f"`{without_places(model.name)}`" + (f" at `{model.revision}`" if model.revision else "")


def _stored_part(stored: StoredStudent | None) -> list[str]:
    if stored is None:
        return []
    return ["## How it is stored", "", *(f"- {line[0].upper()}{line[1:]}." for line in stored.lines()), ""]


def _scores_part(identity: Identity | None) -> str:
    if identity is None:
        return "None: its loss is the cross entropy to the data alone.\n"
    return (
        f"Identity `{identity_hash(identity)}`, which stands for:\n\n```json\n"
        f"{json.dumps(without_places(identity), indent=1, ensure_ascii=False)}\n```\n"
    )
