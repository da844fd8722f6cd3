"""Which model stands where in a run: as it begins, fine-tuned, and distilled."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from actors.config.model_kinds import PretrainedModel
from actors.config.places import in_object_storage
from actors.evaluation.answer_ends import AnswerEnds, settle_answer_ends, write_answer_ends
from actors.lora import load_adapter
from actors.model_source import ModelSource
from actors.models import load_model, save_model, scratch_model
from orchestrator.config.run import RunConfig
from orchestrator.config.sides import StudentConfig, TeacherConfig
from orchestrator.data.chat_templates import with_default_args
from orchestrator.data.tokenizers import ids_of, load_tokenizer, require_same_tokens, train_tokenizer
from orchestrator.models.layer_cut import cut_settings, layers_of, named_layers
from orchestrator.models.model_files import base_of_adapter, stored_dtype
from orchestrator.models.stored_models import renew, stored_model

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = ("teacher", "student")


class Models:
    """The models and the tokenizer of one run, by role.

    Args:
        config: of the run, or of a trial.
        folder: of the run.
        drawn_student: folder of a student that is drawn for one trial alone; None for the run's own.
    """

    def __init__(self, config: RunConfig, folder: Path, drawn_student: Path | None = None) -> None:
        self.config = config
        self.drawn_student = drawn_student
        self.tokenizer_folder = folder / "tokenizer"
        self.student_folder = folder / "student"
        self.students_own_tokens: list[str] = []
        """Tokens that a pretrained student's tokenizer has and the teacher's has not; known once the tokenizer is chosen."""
        self._folder = folder / "models"

    def side(self, role: Role) -> TeacherConfig | StudentConfig:
        """Return the section of the configuration that speaks of a role."""
        return self.config.teacher if role == "teacher" else self.config.student

    def classes_of(self, role: Role) -> int:
        """Return how many labels a role's model tells apart; 0 for a language model, which may answer with label words."""
        return 0 if role == "teacher" and self.config.teacher.label_words is not None else self.config.classes

    def named(self, role: Role) -> ModelSource:
        """Return the model that the configuration names; of an adapter, its base; of one that this run makes, its folder."""
        model = self.side(role).model
        if model.kind == "cut":
            return replace(self.named("teacher"), name=str(self._folder / f"{role}_cut"), revision=None)
        if not isinstance(model, PretrainedModel):
            return self.made(role)
        local = self._folder_of(role, model)
        name = str(local.resolve()) if local.is_dir() else model.name
        source = ModelSource(name, model.revision, model.trust_remote_code, model.attention, self.classes_of(role))
        base = base_of_adapter(local, f"{role}.model.name")
        return source if base is None else replace(source, name=base.name, revision=base.revision)

    def made(self, role: Role) -> ModelSource:
        """Return the folder of a model that this run draws, or gives a classification head."""
        drawn = self.drawn_student if role == "student" else None
        folder = str(drawn or self._folder / f"{role}_scratch")
        if isinstance(self.side(role).model, PretrainedModel):
            return replace(self.named(role), name=folder, revision=None)
        return ModelSource(folder, classes=self.config.classes)

    def begun(self, role: Role) -> ModelSource:
        """Return the model as it is before any training in this run; of an adapter, its base with the adapter merged."""
        if self.classes_of(role):
            made = self.made(role)
            return made if Path(made.name).exists() else self.named(role)
        folder = self._adapter(role)
        named = self.named(role)
        return named if folder is None else replace(named, name=str(self._folder / f"{role}_merged"), revision=None)

    def settings(self, role: Role) -> PreTrainedConfig:
        """Return a model's config.json; of a student that is not cut yet, the teacher's with fewer layers.

        Raises:
            ValueError: if there is none that can be read, or the student cannot be cut from the teacher so.
        """
        model, named = self.side(role).model, self.named(role)
        if model.kind != "cut" or Path(named.name).is_dir():
            return config_of(named, f"{role}.model.name")
        teacher = self.settings("teacher")
        return cut_settings(teacher, named_layers(model, layers_of(teacher)))

    def made_for_the_rows(self, role: Role) -> bool:
        """Whether a model's positions and vocabulary are made for the rows of this run: from scratch, or cut from one that is."""
        kind = self.side(role).model.kind
        return kind == "scratch" or (kind == "cut" and self.config.teacher.model.kind == "scratch")

    def merge_adapter(self, role: Role) -> str | None:
        """Merge a role's model, if it is an adapter, with its base, unless that is done; return what was done in words.

        Raises:
            ValueError: if the base cannot be loaded, or the adapter was not made for it.
        """
        adapter, folder = self._adapter(role), Path(self.begun(role).name)
        if adapter is None or folder.exists():
            return None
        base = self.named(role)
        try:
            model = load_model(base)
        except OSError as error:
            raise ValueError(
                f"{role}.model.name {adapter} is an adapter for {base.name!r}, which cannot be loaded: {error}"
            ) from error
        folder.parent.mkdir(parents=True, exist_ok=True)
        merged = load_adapter(str(adapter), model).to(getattr(torch, stored_dtype(base)))
        save_model(merged, self.own_tokenizer(role), folder)
        return f"{role}: the adapter {adapter} was merged into {base.name}"

    def _adapter(self, role: Role) -> Path | None:
        """Return the folder of a role's adapter; None where its model is a whole one."""
        model = self.side(role).model
        if model.kind != "pretrained":
            return None
        folder = self._folder_of(role, model)
        return folder.resolve() if base_of_adapter(folder, f"{role}.model.name") is not None else None

    def _folder_of(self, role: Role, model: PretrainedModel) -> Path:
        """Return the folder that a model's name means, of an address a copy; of a name of the hub one that is not there."""
        if in_object_storage(model.name):
            return stored_model(model.name, f"{role}.model.name")
        return Path(model.name).expanduser()

    def export_dtype(self) -> str:
        """Return the type in which the student's weights are stored in the end."""
        if self.config.export.dtype != "as_loaded":
            return self.config.export.dtype
        if self.config.student.model.kind not in ("pretrained", "cut"):
            return "float32"
        return stored_dtype(self.begun("student"))

    def finetuned_folder(self, role: Role) -> Path:
        """Return the folder into which a role's model is fine-tuned."""
        return self._folder / f"{role}_finetuned"

    def ready(self, role: Role) -> ModelSource:
        """Return the teacher that scores, or the student as it is before distillation."""
        begun = self.begun(role)
        return replace(begun, name=str(self.finetuned_folder(role)), revision=None) if self.side(role).finetune else begun

    def distilled(self) -> ModelSource:
        """Return the student as it is after distillation."""
        return replace(self.begun("student"), name=str(self.student_folder), revision=None)

    def tokenizer_for(self, training_texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """Return, and keep, the tokenizer both models speak: trained on the texts, or the teacher's own.

        Raises:
            ValueError: if a pretrained student's tokens are others than the teacher's.
        """
        tokenizer = self._choose_tokenizer(training_texts)
        if (chat := self.config.data.chat) is not None:  # the exported student speaks as it was taught
            template = chat.template or tokenizer.chat_template
            if isinstance(template, str):  # a tokenizer may have several by name, and none is refused when rows are rendered
                tokenizer.chat_template = with_default_args(template, chat.template_args)
        tokenizer.save_pretrained(self.tokenizer_folder)
        return tokenizer

    def _choose_tokenizer(self, training_texts: Iterable[str]) -> PreTrainedTokenizerBase:
        if self.config.tokenizer is not None:
            return train_tokenizer(training_texts, self.config.tokenizer.vocab_size)
        tokenizers = [self.own_tokenizer(role) for role in self._owners_of_tokenizers()]
        if len(tokenizers) == 2:
            self.students_own_tokens = require_same_tokens(*tokenizers)
        return tokenizers[0]

    def settle_answer_ends(self, tokenizer: PreTrainedTokenizerBase, turn_ends: Iterable[str]) -> AnswerEnds:
        """Settle where answers end, and keep it beside the tokenizer; ``turn_ends`` are those of the rows, most usual first."""
        ends = settle_answer_ends(tokenizer, turn_ends, [self.begun(role) for role in self._owners_of_tokenizers()])
        write_answer_ends(ends, tokenizer, self.tokenizer_folder)
        return ends

    def make_scratch_models(self, tokenizer: PreTrainedTokenizerBase, roles: Sequence[Role] = ROLES) -> None:
        """Draw the weights of the models that are made from scratch."""
        for seed, role in enumerate(ROLES, start=self.config.seed):
            shape = self.side(role).model
            folder = Path(self.begun(role).name)
            if role in roles and shape.kind == "scratch" and not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                model = scratch_model(shape, tokenizer, self._vocab_size(tokenizer), self.config.longest_text, seed)
                save_model(model, tokenizer, folder)

    def tokenizer_folder_of(self, role: Role) -> Path:
        """Return where the tokenizer by which a role's model reads is kept: a classifier that teaches may have one of its own."""
        own = self.tokenizer_folder.with_name(f"{role}_tokenizer")
        return own if own.exists() else self.tokenizer_folder

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the run's tokenizer."""
        source = self.tokenizer_source()
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=source.trust_remote_code)

    def tokenizer_source(self) -> ModelSource:
        """Return where the run's tokenizer is loaded from; code that came with it is trusted if that of its model is."""
        owners = self._owners_of_tokenizers()
        return ModelSource(str(self.tokenizer_folder), None, bool(owners) and self.begun(owners[0]).trust_remote_code)

    def _owners_of_tokenizers(self) -> list[Role]:
        """Return the roles whose models bring a tokenizer; the run's is the first one's."""
        return [role for role in ROLES if self.side(role).model.kind == "pretrained"]

    def own_tokenizer(self, role: Role) -> PreTrainedTokenizerBase:
        """Return the tokenizer beside a role's model; an adapter may bring one of its own."""
        source, adapter = self.named(role), self._adapter(role)
        if adapter is not None and (adapter / "tokenizer_config.json").exists():
            source = replace(source, name=str(adapter), revision=None)
        return load_tokenizer(source.name, source.revision, source.trust_remote_code)

    def _vocab_size(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Rows of the output head: those of a pretrained teacher, whose padded ids may stand among the scores."""
        if self.config.teacher.model.kind == "scratch":
            return len(tokenizer)
        return max(len(tokenizer), vocab_size_of(self.begun("teacher")))


def renew_copies(config: RunConfig, weights: bool = True) -> None:
    """Make this node's copies of models in object storage what stands there now, with their weights or without.

    Raises:
        ValueError: naming the key of a model that cannot be copied.
    """
    for role, side in (("teacher", config.teacher), ("student", config.student)):
        if isinstance(side.model, PretrainedModel) and in_object_storage(side.model.name):
            renew(side.model.name, f"{role}.model.name", weights)


def ids_below(models: Models) -> int:
    """Return the id from which on no token is named in scores: the run's tokenizer or the student has none there."""
    return min(ids_of(models.tokenizer()), int(models.settings("student").get_text_config().vocab_size))


def named_below(bound: int, vocab_size: int) -> int | None:
    """Return the bound where it leaves out any token of a teacher with V tokens; None where it does not."""
    return bound if bound < vocab_size else None


def vocab_size_of(source: ModelSource) -> int:
    """Return V, the width of a model's logits, as its configuration has it."""
    return int(config_of(source).get_text_config().vocab_size)


def config_of(source: ModelSource, key: str = "the model") -> PreTrainedConfig:
    """Return a model's config.json; ``key`` names the key of the configuration that names the model.

    Raises:
        ValueError: naming the model, if there is none that can be read.
    """
    try:
        return AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if "model_type" in reason:
            reason += "; an adapter can be named by the folder that it was downloaded to"
        raise ValueError(
            f"{key} {source.name!r}: its config.json, which says what shape it has, is neither in the local cache nor could it "
            f"be fetched ({reason}); a machine with network would do, or a folder with that file: {key}=/a/folder"
        ) from error


def attention_heads(models: Models, role: Role = "teacher") -> tuple[int, int]:
    """Return how many attention heads a model has, and how many of keys and values."""
    model = models.side(role).model
    if model.kind == "cut":
        return attention_heads(models, "teacher")
    if model.kind == "scratch":
        return model.heads, model.kv_heads or model.heads
    settings = config_of(models.named(role), f"{role}.model.name").get_text_config()
    heads = int(settings.num_attention_heads)
    return heads, int(getattr(settings, "num_key_value_heads", None) or heads)
