"""The model card, and the check that an exported student is an ordinary model."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.score_store.identity import identity_hash
from actors.student.finished_model import ExportProof
from orchestrator.config.load import validate
from orchestrator.config.run import RunConfig
from orchestrator.run.export import StoredStudent, check_export, model_card, without_places, write_model_card
from orchestrator.run.results_table import ComparisonTable, metric_rows
from tests.evaluation_world import save_model, save_tokenizer

IDENTITY = {"top_k": 8, "vocab_size": 29, "teacher": {"name": "Org/teacher", "revision": "abc"}, "engine": {"kind": "vllm"}}
SCRATCH = {"kind": "scratch", "hidden_size": 64, "layers": 2, "heads": 2}


def table() -> ComparisonTable:
    names = ("heldout_loss", "kl_to_teacher", "top1_agreement", "calibration_error", "exact_match", "rouge_l", "parameters")
    return ComparisonTable(metric_rows([dict.fromkeys(names, value) for value in (0.125, 0.5, 0.25)]), ())


def config(**changes: object) -> RunConfig:
    tree = {"name": "my-run", "tokenizer": {"vocab_size": 300}, "teacher": {"model": SCRATCH, "finetune": {"train": {}}}}
    return validate({**tree, "student": {"model": SCRATCH}, **changes})


def pretrained(name: str) -> RunConfig:
    model = {"kind": "pretrained", "name": name}
    return config(tokenizer=None, teacher={"model": {"kind": "pretrained", "name": "Org/teacher"}}, student={"model": model})


def front_matter_of(card: str) -> dict[str, object]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_front_matter_is_yaml_and_states_no_licence() -> None:
    card = model_card(config(), IDENTITY, table())
    assert front_matter_of(card) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["knowledge-distillation", "atkd"],
    }  # fmt: skip
    assert "No licence is stated here" in card


def test_the_base_model_is_that_of_a_student_that_others_can_name(tmp_path: Path) -> None:
    assert front_matter_of(model_card(pretrained("Org/small"), IDENTITY, table()))["base_model"] == "Org/small"
    (tmp_path / "mine").mkdir()
    assert "base_model" not in front_matter_of(model_card(pretrained(str(tmp_path / "mine")), IDENTITY, table()))


def test_a_relative_folder_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert "base_model" not in front_matter_of(model_card(pretrained("models/mine"), IDENTITY, table()))


def test_the_card_names_config_scores_and_numbers() -> None:
    card = model_card(config(), IDENTITY, table())
    assert "# my-run\n" in card
    assert identity_hash(IDENTITY) in card and '"revision": "abc"' in card
    assert "| held-out loss (nats per target) | 0.1250 | 0.5000 | 0.2500 |" in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["loss"]["easy_ratio"] == 0.5 and settings["train"]["batch_rows"] == 32
    assert "evaluate" not in settings and "output" not in settings


def test_a_student_without_a_teacher_says_so() -> None:
    card = model_card(config(loss={"kind": "hard_label"}), None, table())
    assert "its loss is the cross entropy to the data alone" in card
    assert "from the teacher" not in card.split("## Results")[0]


def test_places_on_this_machine_stay_out_of_the_card() -> None:
    source = {"source": {"kind": "files", "path": "/home/someone/secret/rows.jsonl"}}
    card = model_card(config(data=source, scores={"root": "~/stores"}), IDENTITY, table())
    assert "rows.jsonl" in card and "someone" not in card and "~/" not in card
    assert without_places({"a": ["/x/y", 3, "Org/name"], "b": None}) == {"a": ["y", 3, "Org/name"], "b": None}


def export_folder(folder: Path) -> Path:
    save_model(folder, seed=3)
    save_tokenizer(folder, eos="w2")
    return folder


def test_a_good_export_passes_and_has_its_card(tmp_path: Path) -> None:
    folder = export_folder(tmp_path / "student")
    write_model_card(folder, config(), IDENTITY, table())
    check_export(folder)
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_adapters_are_no_export(tmp_path: Path) -> None:
    folder = export_folder(tmp_path / "student")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds LoRA adapters, not a whole model; merge them"):
        check_export(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_said(tmp_path: Path) -> None:
    folder = export_folder(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(folder)
    (said,) = check_export(folder)
    assert said.startswith("the tokenizer has 31 tokens and the model 29, as the models that it was made from")


def test_an_export_of_another_type_or_with_other_ends_is_refused(tmp_path: Path) -> None:
    folder = export_folder(tmp_path / "student")
    ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    with pytest.raises(ValueError, match=rf"generation_config\.json in .* ends answers at {ends}, evaluation did at \[1, 2\]"):
        check_export(folder, ends=(1, 2))
    with pytest.raises(ValueError, match=r"is stored in float32, and bfloat16 was asked for \(export\.dtype\)"):
        check_export(folder, dtype="bfloat16")


def test_the_card_says_how_the_student_is_stored(tmp_path: Path) -> None:
    folder = export_folder(tmp_path / "student")
    proof = ExportProof(64, "bfloat16", 1e-9, 2.5e-4, ("lm_head",))
    write_model_card(folder, config(), IDENTITY, table(), StoredStudent("bfloat16", ["<|im_end|> (4)", "</s> (1)"], proof))
    card = (folder / "README.md").read_text()
    for line in (
        "- Weights are stored in bfloat16.", "- Answers end at <|im_end|> (4) or </s> (1), as generation_config.json says.",
        "- On 64 tokens the stored student is 2.5e-04 nats from the trained one (KL a token).",
        "- Untied, since only one of two layers had an adapter: lm_head.",
    ):  # fmt: skip
        assert line in card


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = export_folder(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="gives logits that are not finite"):
        check_export(folder)
