"""A whole run whose student is cut from the fine-tuned teacher and served by vLLM; tiny models, real Ray."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.examples import ExampleFile

MOST = 8
RUN = [
    "name=cut", "tokenizer.vocab_size=400", "data.source.rows=60", "data.heldout_rows=8", "data.max_tokens=96", "scores.top_k=16",
    "scores.rows_per_shard=32", "teacher.model.hidden_size=64", "teacher.model.layers=3", "teacher.model.heads=2",
    "teacher.finetune.train.epochs=2", "teacher.finetune.workers.cpus=1", "teacher.engine.kind=transformers",
    "student={model: {kind: cut, layers: 2, choose: least_influence, influence_rows: 8}}", "train.epochs=1",
    "train.batch_rows=16", "evaluate.generate_rows=0", "evaluate.cpus=1",
    f"responses={{writer: student, max_new_tokens: {MOST}, temperature: 0, engine: {{kind: vllm, dtype: float32}}}}",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow, pytest.mark.ray, pytest.mark.drill,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]  # fmt: skip


def orchestrator(output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "orchestrator", "run", "configs/tiny_cpu.yaml", f"output={output}", *RUN, *overrides]
    return subprocess.run(call, capture_output=True, text=True, timeout=900, env=dict(os.environ))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("output")
    done = orchestrator(output)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return output / "cut", done.stdout


def test_the_student_is_cut_once_the_teacher_is_fine_tuned(finished: tuple[Path, str]) -> None:
    folder, said = finished
    record = json.loads((folder / "models" / "student_cut" / "cut.json").read_text())
    assert record["teacher"] == str(folder / "models" / "teacher_finetuned") and record["of"] == 3
    dropped = record["influences"].index(min(record["influences"]))
    assert record["layers"] == [layer for layer in range(3) if layer != dropped]
    assert said.index("finetune_teacher: done") < said.index("influence of each layer: ") < said.index("cut: done")
    names = ("teacher_finetuned", "student_cut")
    teacher, student = (load_file(folder / "models" / name / "model.safetensors") for name in names)
    for position, layer in enumerate(record["layers"]):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(student[name.format(position)], teacher[name.format(layer)])


@torch.no_grad()
def test_vllm_answers_as_the_folder_says(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    student = AutoModelForCausalLM.from_pretrained(folder / "models" / "student_cut").eval()
    rows = ExampleFile(folder / "data" / "written.arrow")
    for row in range(len(rows)):
        logits = student(torch.from_numpy(rows[row].token_ids).long()[None]).logits[0]
        for place in rows[row].target_positions:
            best, chosen = logits[place - 1].max(), logits[place - 1][int(rows[row].token_ids[place])]
            assert best - chosen < 1e-3


def test_the_student_is_finished_with_the_layers_it_was_cut_to(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert AutoModelForCausalLM.from_pretrained(folder / "student").config.num_hidden_layers == 2
    assert "that began as 2 layers of the teacher" in (folder / "student" / "README.md").read_text()
    assert "2 of its layers" in (folder / "report.html").read_text()


def test_a_run_that_goes_on_does_not_cut_again_and_other_layers_are_refused(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert "cut: done before" in orchestrator(folder.parent).stdout
    refused = orchestrator(folder.parent, "student.model.layers=1")
    assert refused.returncode != 0
    assert "student.model.layers: 1 here, 2 there" in refused.stdout + refused.stderr
