"""Heads that do not go evenly onto the GPUs of a replica are refused before anything is loaded, with a number that would do."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from actors.engines.tensor_parallel import divides, require_whole_heads
from orchestrator.config.load import load_config
from orchestrator.config.run import RunConfig
from orchestrator.models.model_checks import RowLimits, require_models_fit
from orchestrator.models.models import Models, attention_heads
from orchestrator.planning.plan import PlanOptions, make_plan
from tests.worlds import tiny_llama


def checked(config: RunConfig) -> None:
    require_whole_heads(config.teacher.engine.tensor_parallel, *attention_heads(Models(config, config.run_dir)))


def scratch(parallel: int, heads: int = 12, kv_heads: int | None = None) -> RunConfig:
    model = {"kind": "scratch", "hidden_size": 96 * 4, "layers": 1, "heads": heads, "kv_heads": kv_heads}
    engine = {"gpu": True, "tensor_parallel": parallel}
    return load_config("configs/tiny_cpu.yaml", [f"teacher.model={json.dumps(model)}", f"teacher.engine={json.dumps(engine)}"])


@pytest.mark.parametrize(("parallel", "heads", "kv_heads"), [(1, 7, 7), (4, 12, 12), (4, 28, 4), (4, 12, 2), (8, 64, 8)])
def test_heads_that_go_evenly_are_taken(parallel: int, heads: int, kv_heads: int) -> None:
    assert divides(parallel, heads, kv_heads)
    checked(scratch(parallel, heads, kv_heads) if heads == 12 else scratch(1))


@pytest.mark.parametrize(
    ("parallel", "heads", "kv_heads", "fitting"),
    [(8, 12, None, 6), (8, 12, 3, 6), (5, 12, None, 4), (3, 12, 2, 2), (8, 12, 4, 4)],
)
def test_others_are_refused_with_the_next_that_is(parallel: int, heads: int, kv_heads: int | None, fitting: int) -> None:
    with pytest.raises(ValueError, match=rf"tensor_parallel {parallel} does not divide .* 12 attention .* {fitting} would do$"):
        checked(scratch(parallel, heads, kv_heads))
    assert divides(fitting, heads, kv_heads or heads)


def test_a_pretrained_teacher_is_asked_by_its_configuration_alone(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "teacher", seed=1)
    (folder / "model.safetensors").unlink()
    config = load_config(
        "configs/qwen_7b_to_0.5b_one_node.yaml", [f"teacher.model.name={folder}", "teacher.engine.tensor_parallel=3"]
    )
    with pytest.raises(ValueError, match=r"3 does not divide the teacher's 2 attention heads .* tensor_parallel 2 would do$"):
        checked(config)


def test_a_student_that_writes_with_the_teachers_engine_is_asked_too(tmp_path: Path) -> None:
    teacher, student = (tiny_llama(tmp_path / role, seed=1, hidden_size=32) for role in ("teacher", "student"))
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 4, "num_key_value_heads": 4}))
    overrides = [
        f"teacher.model.name={teacher}", f"student.model.name={student}", "teacher.engine.tensor_parallel=4",
        "data.max_tokens=32", "evaluate.max_new_tokens=8",
    ]  # fmt: skip
    for writer, refused in (("teacher", False), ("student", True)):
        config = load_config("configs/qwen_7b_to_0.5b_one_node.yaml", [*overrides, f"responses={{writer: {writer}}}"])
        with pytest.raises(ValueError, match="4 does not divide the student's 2") if refused else nullcontext() as raised:
            require_models_fit(config, Models(config, config.run_dir), RowLimits(20, 0, -1))
    assert str(raised.value) == (
        "responses.engine.tensor_parallel 4 does not divide the student's 2 attention heads with 2 heads of keys and values; "
        "tensor_parallel 2 would do"
    )


def test_a_plan_says_so_before_anything_starts(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", seed=1)
    config = load_config(
        "configs/qwen_7b_to_0.5b_one_node.yaml",
        [
            f"teacher.model.name={folder}", f"student.model.name={folder}", "teacher.engine.tensor_parallel=4",
            "data.max_tokens=32",
        ],
    )
    options = PlanOptions(gpus=16, gpu_memory=80.0, rows=100, row_tokens=20.0, row_targets=10.0)
    with pytest.raises(ValueError, match=r"^teacher\.engine\.tensor_parallel 4 does not divide"):
        make_plan(config, options)
