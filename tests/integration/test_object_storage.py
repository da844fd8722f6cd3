"""A whole run whose data, scores and finished student stand in object storage: a real S3 server, real Ray Train."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from actors.score_store.store import ScoreStore
from actors.storage.fetched import fetched_files
from actors.storage.folder import open_folder
from actors.storage.transfers import upload
from orchestrator.config.data import TASK_KINDS
from orchestrator.data.synthetic import make_rows
from tests.integration.test_run import TINY
from tests.s3_world import BUCKET, KEYS, environment, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = f"s3://{BUCKET}/scores"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Serve S3, with rows in it; yield the folder of this node's copies."""
    folder = tmp_path_factory.mktemp("storage")
    settings = {**KEYS, "ATKD_CACHE": str(folder / "cache"), "ATKD_CACHE_GIB": "1"}
    with s3_server(folder) as endpoint, environment({**settings, "AWS_ENDPOINT_URL": endpoint}):
        rows = "".join(json.dumps(row) + "\n" for row in make_rows(160, TASK_KINDS, 0))
        open_folder(f"s3://{BUCKET}/data").write("rows.jsonl", rows.encode())
        yield folder / "cache"


def orchestrator(command: str, output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "orchestrator", command, "configs/tiny_cpu.yaml", f"output={output}", *TINY]
    return subprocess.run([*arguments, *SETTINGS, *overrides], capture_output=True, text=True, timeout=600)


SETTINGS = (
    f"data.source={{kind: files, path: 's3://{BUCKET}/data'}}", f"scores.root={ROOT}", "teacher.engine.kind=transformers",
    "train.epochs=2",
)  # fmt: skip


def test_a_run_reads_scores_and_publishes_there_and_another_finds_the_scores(storage: Path, tmp_path: Path) -> None:
    first = orchestrator("run", tmp_path, f"export.publish=s3://{BUCKET}/finished")
    assert first.returncode == 0, first.stderr[-3000:]
    run = tmp_path / "tiny_cpu"
    pointers = json.loads((run / "scores.json").read_text())
    assert all(place.startswith(f"{ROOT}/v") and ScoreStore(place).complete for place in pointers.values())
    assert not (tmp_path / "scores").exists()
    assert len(open_folder(ROOT).folders()) == 2
    assert not [name for name in open_folder(pointers["train"]).names() if name.endswith((".lease", ".tmp"))]

    published = open_folder(f"s3://{BUCKET}/finished/tiny_cpu")
    assert published.read("table.json") == (run / "table.json").read_bytes()
    assert b"<html" in published.read("report.html")
    folder = tmp_path / "student"
    folder.mkdir()
    for copy in fetched_files(f"s3://{BUCKET}/finished/tiny_cpu/student", lambda name: True):
        (folder / copy.name).write_bytes(copy.read_bytes())
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0

    upload(run / "models" / "teacher_finetuned", f"s3://{BUCKET}/models")
    teacher, student = (f"s3://{BUCKET}/{place}" for place in ("models/teacher_finetuned", "finished/tiny_cpu/student"))
    second = orchestrator(
        "run", tmp_path, "name=another", "train.epochs=1", "tokenizer=null",
        f"teacher={{model: {{kind: pretrained, name: '{teacher}'}}, engine: {{kind: transformers, dtype: float32}}}}",
        f"student={{model: {{kind: pretrained, name: '{student}'}}}}",
    )  # fmt: skip
    assert second.returncode == 0, second.stderr[-3000:]
    assert "score: train found complete in s3://" in second.stdout, "the same teacher, wherever it stands"
    assert f"from {teacher} to {storage}" in second.stdout and f"from {student} to {storage}" in second.stdout
    verified = orchestrator("verify", tmp_path)
    assert verified.returncode == 0 and f"in {pointers['train']}" in verified.stdout
    changed = open_folder(f"s3://{BUCKET}/data")
    changed.write("rows.jsonl", changed.read("rows.jsonl") + b'{"instruction": "One more?", "input": "", "response": "No."}\n')
    third = orchestrator("run", tmp_path)
    assert third.returncode == 2 and "was changed since this run read it" in third.stderr
