"""Which model stands where in a run: as it begins, fitted, and distilled."""

from pathlib import Path
from typing import Literal

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from actors.student_model import save_model, scratch_model
from actors.training_task import ModelSource
from orchestrator.config import RunConfig, StudentConfig, TeacherConfig
from orchestrator.tokenizers import load_tokenizer, require_same_tokens, train_tokenizer

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = ("teacher", "student")


class Models:
    """The models and the tokenizer of one run, by role."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config = config
        self.tokenizer_folder = folder / "tokenizer"
        self.student_folder = folder / "student"
        self._folder = folder / "models"

    def side(self, role: Role) -> TeacherConfig | StudentConfig:
        """Return the section of the configuration that speaks of a role."""
        return self.config.teacher if role == "teacher" else self.config.student

    def begun(self, role: Role) -> ModelSource:
        """Return the model as it is before any training in this run."""
        model = self.side(role).model
        if model.kind == "scratch":
            return ModelSource(str(self._folder / f"{role}_scratch"))
        local = Path(model.name).expanduser()
        name = str(local.resolve()) if local.is_dir() else model.name
        return ModelSource(name, model.revision, model.trust_remote_code)

    def fitted_folder(self, role: Role) -> Path:
        """Return the folder into which a role's model is fitted."""
        return self._folder / f"{role}_fitted"

    def ready(self, role: Role) -> ModelSource:
        """Return the teacher that scores, or the student as it is before distillation."""
        begun = self.begun(role)
        return ModelSource(str(self.fitted_folder(role)), None, begun.trust_remote_code) if self.side(role).fit else begun

    def distilled(self) -> ModelSource:
        """Return the student as it is after distillation."""
        return ModelSource(str(self.student_folder), None, self.begun("student").trust_remote_code)

    def tokenizer_for(self, training_texts: list[str]) -> PreTrainedTokenizerBase:
        """Return, and keep, the tokenizer both models speak: trained on the texts, or the teacher's own.

        Raises:
            ValueError: if a pretrained student's tokens are others than the teacher's.
        """
        tokenizer = self._choose_tokenizer(training_texts)
        data_format = self.config.data.format
        if data_format.kind == "chat" and data_format.template is not None:
            tokenizer.chat_template = data_format.template  # the exported student speaks as it was taught
        tokenizer.save_pretrained(self.tokenizer_folder)
        return tokenizer

    def _choose_tokenizer(self, training_texts: list[str]) -> PreTrainedTokenizerBase:
        if self.config.tokenizer is not None:
            return train_tokenizer(training_texts, self.config.tokenizer.vocab_size)
        tokenizers = [self._own_tokenizer(role) for role in self._owners_of_tokenizers()]
        if len(tokenizers) == 2:
            require_same_tokens(*tokenizers)
        return tokenizers[0]

    def make_scratch_models(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Draw the weights of the models that are made from scratch."""
        longest = self.config.data.max_tokens + self.config.evaluate.max_new_tokens
        for seed, role in enumerate(ROLES, start=self.config.seed):
            shape = self.side(role).model
            folder = Path(self.begun(role).name)
            if shape.kind == "scratch" and not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                save_model(scratch_model(shape, tokenizer, self._vocab_size(tokenizer), longest, seed), tokenizer, folder)

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

    def _own_tokenizer(self, role: Role) -> PreTrainedTokenizerBase:
        source = self.begun(role)
        return load_tokenizer(source.name, source.revision, source.trust_remote_code)

    def _vocab_size(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Rows of the output head: those of a pretrained teacher, whose padded ids may stand among the scores."""
        if self.config.teacher.model.kind == "scratch":
            return len(tokenizer)
        return max(len(tokenizer), vocab_size_of(self.begun("teacher")))


def vocab_size_of(source: ModelSource) -> int:
    """Return V, the width of a model's logits, as its configuration has it."""
    config = AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=source.trust_remote_code)
    return int(config.get_text_config().vocab_size)
