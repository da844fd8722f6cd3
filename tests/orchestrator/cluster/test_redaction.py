"""Secrets stay out of events, error logs and pages."""

import json
from pathlib import Path

import pytest

from orchestrator.cluster.environment import note_process
from orchestrator.cluster.redaction import without_private_values, without_secrets, without_secrets_within
from orchestrator.error_log import write_traceback
from orchestrator.reports.run_report import write_report
from orchestrator.run.run_dir import RunDir
from tests.orchestrator.config.test_run import changed
from tests.orchestrator.pages import EVENTS, whole_run
from tests.orchestrator.searches import begin, fail_trial

SECRETS = {
    "HF_TOKEN": "hf_NotARealTokenOfAnyone", "RAY_AUTH_TOKEN": "not&a'real\"<ray>token", "WANDB_API_KEY": "40aa7f3b55c8d6e1",
    "DB_PASSWORD": "correct horse battery",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def test_values_of_secret_variables_are_hidden_however_they_are_written() -> None:
    secret = {"X_TOKEN": "a<b&c\"d'e", "api_key": "abcdefgh"}
    environment = {**secret, "HOME": "/home/somebody", "SWITCH_KEY": "1", "MAX_TOKENS": "12345678"}
    for text in ("a<b&c\"d'e", "a&lt;b&amp;c&#34;d&#39;e", "a&lt;b&amp;c&quot;d&#x27;e", "abcdefgh"):
        assert without_private_values(f"-{text}-", environment) == "-(hidden)-"
    kept = "1 /home/somebody 12345678"
    assert without_private_values(kept, environment) == kept


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run a.yaml data.token=abc", "run a.yaml data.token=(hidden)"),
        ("AZURE_STORAGE_CONNECTION_STRING=AccountName=a", "AZURE_STORAGE_CONNECTION_STRING=(hidden)"),
        ("AccountName=a;AccountKey=k+/=;X=1", "AccountName=a;AccountKey=(hidden);X=1"),
        ("at 'http://h/c/x?sv=1&sig=ab%2F&se=2'", "at 'http://h/c/x?sv=1&sig=(hidden)&se=2'"),
        ("hub.api_key='a b' x=1", "hub.api_key=(hidden) x=1"),
        ("password: hunter2", "password: (hidden)"),
        ("name=hf_abcdefghijklmnopqrst", "name=(hidden)"),
        ("path=https://me:pw@host/x", "path=https://(hidden)@host/x"),
        *((kept, kept) for kept in ("tokenizer.vocab_size=300 data.max_tokens=96", "loss.tokens=all key_length: 3")),
    ],
)  # fmt: skip
def test_settings_that_are_secret_by_name_or_look_are_hidden(text: str, shown: str) -> None:
    assert without_secrets(text, {}) == shown


def test_settings_are_hidden_at_any_depth() -> None:
    tree = {"data": {"token": "x", "max_tokens": 3, "names": ["hf_abcdefghijklmnopqrst", 4]}, "secret": None, "key": {"a": 1}}
    assert without_secrets_within(tree, {}) == {
        "data": {"token": "(hidden)", "max_tokens": 3, "names": ["(hidden)", 4]}, "secret": None, "key": {"a": 1},
    }  # fmt: skip


def test_no_file_of_a_run_holds_a_secret(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = " ".join(environment.values())
    monkeypatch.setattr("sys.argv", ["/x/orchestrator/__main__.py", "run", "a.yaml", f"name={everything}"])
    run = whole_run(tmp_path / "run")
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    answers = run / "evaluation" / "student_after.json"
    run_dir = RunDir(run)
    note_process(run_dir)
    run_dir.event("something", message=everything, parts=[{"a": everything}])
    write_traceback(run, ValueError(everything))
    ledger = begin(run / "tune")
    fail_trial(ledger, 0, {})
    ledger.ended(0, "failed", 0, {}, 1.0, 0, everything)
    answers.write_text(answers.read_text().replace('"generated": ""', f'"generated": {json.dumps(everything)}'))
    page = write_report(run).read_text()
    assert page.count("(hidden)") > 6, "answers that hold one, and the command"
    answers.unlink()  # the data's own texts are what the user gave
    for path in [file for file in run.rglob("*") if file.is_file()]:
        content = path.read_bytes()
        assert not [name for name, value in environment.items() if value.encode() in content], path


def test_a_run_begun_with_secrets_around_it_writes_none(tmp_path: Path, environment: dict[str, str]) -> None:
    with RunDir.open(changed(f"output={tmp_path}")) as run_dir:
        note_process(run_dir)
    files = [file for file in run_dir.path.rglob("*") if file.is_file()]
    assert {"config.yaml", "events.jsonl"} <= {file.name for file in files}
    for path in files:
        assert not [name for name, value in environment.items() if value.encode() in path.read_bytes()], path
