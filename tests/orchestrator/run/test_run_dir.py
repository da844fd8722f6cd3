"""The folder of a run."""

import json
import re
from pathlib import Path

import pytest

from orchestrator.run.run_dir import MAY_CHANGE, RunDir, RunDirError
from tests.orchestrator.config.test_run import changed


def test_a_stage_is_done_once_and_its_facts_come_back(tmp_path: Path) -> None:
    config, calls = changed(f"output={tmp_path}"), []
    for _ in range(2):
        with RunDir.open(config) as run_dir:
            facts = run_dir.stage("prepare", lambda: calls.append(1) or {"rows": 3})  # type: ignore[func-returns-value]
        assert facts["rows"] == 3
    assert len(calls) == 1
    lines = (tmp_path / "small" / "run.log").read_text().splitlines()
    assert "INFO prepare: done in" in lines[0] and lines[1].endswith("INFO prepare: done before")
    events = [json.loads(line) for line in (tmp_path / "small" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["stage_started", "stage_finished"]


def test_a_stage_that_fails_is_not_done(tmp_path: Path) -> None:
    with RunDir.open(changed(f"output={tmp_path}")) as run_dir:
        with pytest.raises(ZeroDivisionError):
            run_dir.stage("prepare", lambda: {"rows": 1 // 0})
        assert run_dir.result("prepare") is None


def test_an_error_is_in_the_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_NotARealTokenOfAnyone")
    with pytest.raises(ValueError, match="no room"), RunDir.open(changed(f"output={tmp_path}")):
        raise ValueError("no room for hf_NotARealTokenOfAnyone")
    (event,) = [json.loads(line) for line in (tmp_path / "small" / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["error"]) == ("ended_by_error", "ValueError: no room for (hidden)")


def test_the_folder_of_another_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    RunDir.open(changed(f"output={tmp_path}")).close()
    with pytest.raises(
        RunDirError, match=r"made by another configuration; give this run another name.*\n  seed: 5 here, 0 there"
    ):
        RunDir.open(changed(f"output={tmp_path}", "seed=5"))
    RunDir.open(changed(f"output={tmp_path}")).close()


def test_responses_cannot_change_but_who_serves_the_writer_may(tmp_path: Path) -> None:
    written = "responses={writer: teacher, engine: {kind: transformers, cpus: 1}}"
    RunDir.open(changed(f"output={tmp_path}", written)).close()
    for change, line in (
        ("responses=null", "responses: None here, {'writer': 'teacher'"),
        ("responses.writer=student", "responses.writer: 'student' here, 'teacher' there"),
        ("responses.top_p=0.9", "responses.top_p: 0.9 here, 1.0 there"),
        ("responses.engine.kind=vllm", "responses.engine.kind: 'vllm' here, 'transformers' there"),
    ):
        with pytest.raises(RunDirError) as refused:
            RunDir.open(changed(f"output={tmp_path}", written, change))
        assert f"\n  {line}" in str(refused.value)
    RunDir.open(changed(f"output={tmp_path}", written, "responses.engine.cpus=2", "responses.engine.replicas=3")).close()


def test_checkpoints_elsewhere_stand_under_a_name_that_no_other_folder_has(tmp_path: Path) -> None:
    drawn = []
    for place in (tmp_path / "one", tmp_path / "another"):
        with RunDir.open(changed(f"output={place}")) as run_dir:
            assert run_dir.checkpoints(None) == str(place / "small" / "checkpoints")
            drawn.append(run_dir.checkpoints("s3://bucket/checkpoints"))
        with RunDir.open(changed(f"output={place}")) as run_dir:
            assert run_dir.checkpoints("s3://bucket/checkpoints") == drawn[-1]
    assert len(set(drawn)) == 2 and all(one.startswith("s3://bucket/checkpoints/small-") for one in drawn)


def test_two_processes_cannot_hold_one_folder(tmp_path: Path) -> None:
    config = changed(f"output={tmp_path}")
    with RunDir.open(config), pytest.raises(RunDirError, match="another process works in .*small; wait for it"):
        RunDir.open(config)
    RunDir.open(changed(f"output={tmp_path}")).close()


def test_a_submitted_job_does_not_write_into_its_own_copy_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirError, match="output 'runs' is relative, and a submitted job works in Ray's copy .*output=/a"):
        RunDir.open(changed("output=runs"))
    assert not (tmp_path / "runs").exists()
    RunDir.open(changed(f"output={tmp_path}")).close()


def test_what_is_searched_in_a_run_may_change(tmp_path: Path) -> None:
    RunDir.open(changed(f"output={tmp_path}")).close()
    RunDir.open(changed(f"output={tmp_path}")).close()
    RunDir.open(changed(f"output={tmp_path}", "tune.rungs=2", "compare.seeds=5", "workers={min: 1, max: 2}")).close()
    (event,) = [json.loads(line) for line in (tmp_path / "small" / "events.jsonl").read_text().splitlines()]
    assert event["event"] == "configuration_changed"
    assert event["changes"] == [
        "workers.min: 1 now, None at first", "workers.max: 2 now, None at first", "workers.count: None now, 1 at first",
        "tune.rungs: 2 now, 4 at first", "compare.seeds: 5 now, 3 at first",
    ]  # fmt: skip


@pytest.mark.parametrize("path", MAY_CHANGE)
def test_each_key_that_may_change_is_one_of_the_configuration(path: str) -> None:
    fit = {"train": {}}
    fitted = [f"{role}.finetune={json.dumps(fit)}" for role in ("teacher", "student")]
    engines = "engine: {kind: transformers}, teacher_share: 0.2, teacher_engine: {kind: transformers}"
    written = ["responses={writer: teacher, engine: {kind: vllm}}", f"rollouts={{{engines}}}"]
    settings = changed(*fitted, *written).model_dump(mode="json")
    for name in path.split("."):
        assert name in settings, path
        settings = settings[name]


def test_how_the_work_is_cut_may_change_and_what_comes_out_may_not(tmp_path: Path) -> None:
    here = f"output={tmp_path}"
    RunDir.open(changed(here)).close()
    cut = [
        "train.micro_batch_rows=2", "train.gradient_checkpointing=true", "train.checkpoint_every_steps=7", "scores.overlap=false",
        "teacher.engine.replicas=3", "teacher.engine.cpus=2", "teacher.finetune.train.micro_batch_rows=1",
        "evaluate.batch_rows=3", "teacher.finetune.workers.count=2", "train.max_failures=9", "train.micro_batch_tokens=64",
        "train.packing=true",
    ]  # fmt: skip
    RunDir.open(changed(here, *cut)).close()
    for other in ("train.batch_rows=2", "teacher.engine.dtype=float32", "train.precision=bfloat16", "scores.top_k=5"):
        with pytest.raises(RunDirError, match=rf"\n  {other.split('=')[0]}: [^\n]*$"):
            RunDir.open(changed(here, *cut, other))
    passes = [here, "name=passes", "loss={kind: atkd, scope: microbatch}"]
    RunDir.open(changed(*passes)).close()
    with pytest.raises(RunDirError, match=r"train\.micro_batch_rows: 2 here, 8 there"):
        RunDir.open(changed(*passes, "train.micro_batch_rows=2"))
    written = tmp_path / "passes" / "config.yaml"
    written.write_text(re.sub(r"\n *packing: false", "", written.read_text()))
    RunDir.open(changed(*passes)).close()
    with pytest.raises(RunDirError, match=r"train\.packing: True here, None there"):
        RunDir.open(changed(*passes, "train.micro_batch_tokens=64", "train.packing=true"))


def test_who_watches_a_run_may_change_and_must_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    RunDir.open(changed(f"output={tmp_path}")).close()
    RunDir.open(changed(f"output={tmp_path}", "tracking.tensorboard=false")).close()
    monkeypatch.setattr("actors.config.tracking.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tracking.wandb is set, but wandb is not installed: pip install '.\[wandb\]'"):
        RunDir.open(changed(f"output={tmp_path}/new", "tracking.wandb.project=p"))
    assert not (tmp_path / "new").exists()
