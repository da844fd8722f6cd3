"""A whole run from the command line in which a causal language model teaches a classifier by its answers in label words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from actors.model_source import ModelSource
from actors.models import load_model
from actors.score_store.store import ScoreStore
from orchestrator.data.grading import make_graded_answers
from orchestrator.data.tokenizers import train_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def language_model(folder: Path) -> Path:
    tokenizer = train_tokenizer([" ".join(row.values()) for row in make_graded_answers(60, 1)], 400)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model_teaches_a_classifier_by_its_words(tmp_path: Path) -> None:
    overrides = [
        f"output={tmp_path}", f"teacher.model.name={language_model(tmp_path / 'model')}", "data.source.rows=60",
        "data.heldout_rows=20", "tokenizer.vocab_size=320", "student.model={kind: text_mlp}", "train.epochs=1",
        "scores.rows_per_shard=16",
    ]  # fmt: skip
    command = [sys.executable, "-m", "orchestrator", "run", "configs/grading_lm_cpu.yaml", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "grading_lm_cpu"
    rows = {row["metric"]: row["values"] for row in json.loads((run / "table.json").read_text())["rows"]}
    teacher = ScoreStore(json.loads((run / "scores.json").read_text())["heldout"])
    assert teacher.complete and teacher.top_k == 2 and teacher.identity["label_words"]["words"] == [" wrong", " partly", " right"]
    loss = -sum(float(teacher.scores_at(row).target_logprob[0]) for row in range(20)) / 20
    assert rows["heldout_loss"][0] == pytest.approx(loss, abs=1e-5)
    assert rows["parameters"][0] > 10_000 and rows["kl_to_teacher"][0] == 0 and rows["kl_to_teacher"][2] > 0
    for measure in ("accuracy", "macro_f1", "weighted_kappa", "calibration_error"):
        assert all(-1 <= value <= 1 for value in rows[measure])
    assert rows["milliseconds_a_row"][0] is None and rows["milliseconds_a_row"][2] > 0
    assert load_model(ModelSource(str(run / "student"), classes=3)).config.num_labels == 3
