"""Which model and which tokenizer a run works with."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from actors.config.models import EvaluateConfig
from actors.evaluation.evaluator import evaluate_model
from actors.examples import ExampleFile
from actors.models import load_model
from actors.student.loop import distil
from actors.student.train_checkpoints import NoCheckpoints
from orchestrator.config.load import validate
from orchestrator.models.models import ROLES, Models
from orchestrator.run import stages
from orchestrator.run.export import check_export
from orchestrator.run.run_dir import RunDir
from orchestrator.run.scoring import ScoringStage
from tests.orchestrator.config.test_run import SMALL
from tests.orchestrator.trial_world import TOP_K, fill, unscored_run
from tests.worlds import VOCAB, tiny_llama, word_tokenizer


def models_of(folder: Path, **sections: Any) -> Models:
    return Models(validate({**copy.deepcopy(SMALL), **sections}), folder)


def pretrained(path: Path) -> dict[str, Any]:
    return {"model": {"kind": "pretrained", "name": str(path)}}


def test_a_pair_of_one_vocabulary_shares_the_teachers_tokenizer(tmp_path: Path) -> None:
    teacher, student = tiny_llama(tmp_path / "teacher", seed=0), tiny_llama(tmp_path / "student", seed=1)
    models = models_of(tmp_path / "run", tokenizer=None, teacher=pretrained(teacher), student=pretrained(student))
    assert models.tokenizer_for([]).get_vocab() == models.tokenizer().get_vocab() == word_tokenizer().get_vocab()
    assert models.ready("teacher").name == str(teacher) and models.ready("student").name == str(student)


def test_a_pair_of_two_vocabularies_is_refused_with_the_tokens_that_differ(tmp_path: Path) -> None:
    teacher, student = tiny_llama(tmp_path / "teacher", seed=0), tiny_llama(tmp_path / "student", seed=1)
    word_tokenizer(VOCAB - 3).save_pretrained(student)
    models = models_of(tmp_path / "run", tokenizer=None, teacher=pretrained(teacher), student=pretrained(student))
    with pytest.raises(ValueError, match=f"w{VOCAB - 1}"):
        models.tokenizer_for([])


def test_a_scratch_student_is_as_wide_as_a_pretrained_teachers_head(tmp_path: Path) -> None:
    teacher = tiny_llama(tmp_path / "teacher", seed=0)
    word_tokenizer(VOCAB - 6).save_pretrained(teacher)  # a head padded beyond the tokenizer's ids
    models = models_of(tmp_path / "run", tokenizer=None, teacher=pretrained(teacher))
    models.make_scratch_models(models.tokenizer_for([]))
    student = AutoModelForCausalLM.from_pretrained(models.begun("student").name)
    assert student.get_output_embeddings().weight.shape[0] == VOCAB


def test_a_finetuned_model_takes_the_place_of_the_one_it_began_as(tmp_path: Path) -> None:
    models = models_of(tmp_path / "run")
    assert models.ready("teacher").name == str(models.finetuned_folder("teacher")) != models.begun("teacher").name
    assert models.ready("student") == models.begun("student")


def test_a_chat_template_of_the_configuration_goes_with_the_tokenizer(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    models = models_of(tmp_path / "run", data={"format": {"kind": "chat", "template": template}}, tokenizer={"vocab_size": 300})
    models.tokenizer_for([" ".join(f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmn" for c in "opqrst")])
    assert models.tokenizer().chat_template == template


def model_with_code(folder: Path, seed: int) -> Path:
    """Write a model and a tokenizer whose classes stand in a file beside them."""
    tiny_llama(folder, seed)
    model = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    says = {
        "config.json": {"model_type": "own", "architectures": ["OwnModel"], "auto_map": model},
        "tokenizer_config.json": {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
    }
    for file, fields in says.items():
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


def test_models_whose_code_is_trusted_are_finetuned_distilled_evaluated_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "train_model", lambda task, *_: distil(task, NoCheckpoints()))
    short = {"epochs": 1, "batch_rows": 16}
    trusted = {
        role: {
            "model": {
                "kind": "pretrained", "name": str(model_with_code(tmp_path / role, seed)), "trust_remote_code": True,
            },
            "finetune": {"train": short},
        }
        for seed, role in enumerate(ROLES)
    }  # fmt: skip
    config = unscored_run(tmp_path, **trusted, train=short)
    with RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        for role in ROLES:
            stages.finetune(role, config, run_dir, models)
        scoring = ScoringStage(config, run_dir, models)
        for split, store in (("train", scoring.training_store), ("heldout", scoring.heldout_store)):
            assert store is not None
            fill(store, ExampleFile(run_dir.path / "data" / f"{split}.arrow"), seed=0)
        stages.train(config, run_dir, models, scoring.training_store)
        (run_dir.path / "data" / "heldout_texts.jsonl").write_text(
            "".join(
                json.dumps({"row": row, "prompt": "w5", "response": "w6"}) + "\n"
                for row in ExampleFile(run_dir.path / "data" / "heldout.arrow").rows.tolist()
            )
        )
        for source in (models.ready("teacher"), models.ready("student"), models.distilled()):
            assert type(load_model(source)).__name__ == "OwnModel"
            found = evaluate_model(
                source, models.tokenizer_source(), str(run_dir.path / "data" / "heldout.arrow"), scoring.heldout_store.place,
                str(run_dir.path / "data" / "heldout_texts.jsonl"), EvaluateConfig(generate_rows=1, max_new_tokens=2), TOP_K,
            )  # fmt: skip
            assert len(found.answers) == 1
        check_export(models.student_folder, trust_remote_code=models.distilled().trust_remote_code)
        with pytest.raises(ValueError, match="trust_remote_code"):
            check_export(models.student_folder)
