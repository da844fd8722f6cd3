"""What a training is told of its rollouts, and which models cannot have the wire that is asked for."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.model_source import ModelSource
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models
from orchestrator.run.rollouts import require_hidden_states_teach, rollout_task
from orchestrator.run.stages import loads_of
from tests.orchestrator.config.test_run import changed
from tests.worlds import VOCAB, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("pair") / "model", seed=1)


def config_of(folder: Path, rollouts: str) -> RunConfig:
    model, engine = f"{{kind: pretrained, name: {folder}}}", "{kind: transformers, dtype: bfloat16}"
    return changed(
        "tokenizer=null", f"teacher={{model: {model}, engine: {engine}}}", f"student={{model: {model}}}",
        f"output={folder.parent / 'runs'}", f"rollouts={rollouts}",
    )  # fmt: skip


def test_a_training_is_told_whose_head_it_needs(folder: Path) -> None:
    hidden = config_of(folder, "{wire: hidden, student_share: 1.0}")
    task = rollout_task(hidden, hidden.run_dir, hidden.run_dir, Models(hidden, hidden.run_dir))
    assert task is not None and task.head_of is not None
    assert (task.head_of.name, task.head_dtype) == (str(folder), "bfloat16")
    for wire in ("top_k", "candidates"):
        other = config_of(folder, f"{{wire: {wire}}}")
        assert rollout_task(other, other.run_dir, other.run_dir, Models(other, other.run_dir)).head_of is None  # type: ignore[union-attr]
    none = config_of(folder, "null")
    assert rollout_task(none, none.run_dir, none.run_dir, Models(none, none.run_dir)) is None


def test_workers_that_read_the_teachers_head_have_its_files(folder: Path) -> None:
    for wire, readers in (("candidates", 1), ("hidden", 2)):
        config = config_of(folder, f"{{wire: {wire}, student_share: 1.0}}")
        loads = loads_of("train", config, Models(config, config.run_dir))
        assert sum(role == "teacher" for role, _, _ in loads) == readers


def test_a_teacher_of_another_vocabulary_has_no_hidden_states_for_the_student(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB + 1, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    teacher, student = ModelSource(str(tmp_path)), ModelSource(str(folder))
    require_hidden_states_teach(teacher, teacher)
    with pytest.raises(ValueError) as refused:
        require_hidden_states_teach(teacher, student)
    assert str(refused.value) == (
        "rollouts.wire is hidden, but the teacher has a vocabulary of 97 tokens and the student one of 96, and whole "
        "distributions are compared; rollouts.wire=candidates would do"
    )
