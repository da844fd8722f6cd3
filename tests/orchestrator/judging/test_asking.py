"""A judge over HTTP that misbehaves: what is retried, what is counted, what ends the asking, and that nothing is asked twice."""

import re
import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from actors.config.judge import JudgeConfig
from actors.evaluation.answers import GeneratedAnswer
from orchestrator.judging.asking import Asked, JudgeFailed, ask_missing
from orchestrator.judging.client import JudgeClient
from orchestrator.judging.prompts import QuestionTemplate
from orchestrator.judging.questions import Question, QuestionMaker
from orchestrator.judging.replies import Reply
from orchestrator.judging.server import address_of
from orchestrator.judging.verdicts import VerdictBook
from tests.judge_server import JudgeServer, Said, serving

FINE = "Rating A: 8\nRating B: 6"
SECRET = "key-9f8e7d6c5b4a3210-of-the-test"


def settings_for(url: str, **changes: object) -> JudgeConfig:
    given = {"model": "m", "base_url": url, "api_key_variable": None, "concurrent": 4, "retries": 1, "timeout_seconds": 5.0}
    return JudgeConfig.model_validate(given | changes)


def questions_for(settings: JudgeConfig, rows: int) -> list[Question]:
    answers = [GeneratedAnswer(row, None, f"prompt {row}.", "right", f"answer {row}.", False, None) for row in range(rows)]
    template = QuestionTemplate("{{ prompt }}{{ answer_a }}{{ answer_b }}", "the test's")
    return QuestionMaker(settings, address_of(settings), template).ratings({"student_after": answers})


def ask(settings: JudgeConfig, rows: int, path: Path) -> Asked:
    with closing(JudgeClient(settings)) as client:
        return ask_missing(questions_for(settings, rows), VerdictBook(path / "book.jsonl"), client, settings)


def rows_of(server: JudgeServer) -> list[int]:
    """The rows that were asked about, once for each request."""
    return sorted(int(re.findall(r"prompt (\d+)\.", question)[0]) for question in server.questions)


def row_of(text: str) -> int:
    return int(re.findall(r"prompt (\d+)\.|$", text)[0] or -1)


def test_what_is_asked_has_the_settings_and_not_more_at_one_time(tmp_path: Path) -> None:
    with serving(lambda text, before: Said(FINE, after_seconds=0.05)) as server:
        asked = ask(settings_for(server.url, concurrent=3, max_tokens=77), 12, tmp_path)
        assert (asked.asked, asked.failures.total) == (12, 0)
        assert rows_of(server) == list(range(12)) and 1 < server.most_at_once <= 3
        first = server.requests[0]
        assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0.0, 77)
        ask(settings_for(server.url, temperature=None), 1, tmp_path)
        assert "temperature" not in server.requests[-1]


def test_errors_that_pass_are_asked_again(tmp_path: Path) -> None:
    def answer(text: str, before: int) -> Said:
        return Said(FINE) if before else Said("slowly", status=429 if row_of(text) % 2 else 503)

    with serving(answer) as server:
        asked = ask(settings_for(server.url), 4, tmp_path)
        assert asked.failures.total == 0 and rows_of(server) == [0, 0, 1, 1, 2, 2, 3, 3]


def misbehaving(text: str, before: int) -> Said:
    """Rows 0 to 10 fail, each in a way of its own; the others do not."""
    ways = [
        Said("What a lovely day."), Said("Rating A: 11\nRating B: 6"), Said("I'm sorry, I can't help with that."), Said(""),
        Said("Let us see: first", finish_reason="length"), Said(FINE, after_seconds=3.0), Said("too fast", status=429),
        Said("broken", status=500), Said("context too long", status=400), Said(None, refusal="no"), Said("", body="[]"),
    ]  # fmt: skip
    return ways[row_of(text)] if 0 <= row_of(text) < len(ways) else Said(FINE)


def test_what_fails_is_counted_by_kind_with_an_example_and_asked_the_next_time(tmp_path: Path) -> None:
    with serving(misbehaving) as server:
        settings = settings_for(server.url, retries=0, timeout_seconds=2.0, most_failures=0.6, concurrent=8)
        failures = ask(settings, 20, tmp_path).failures
        assert failures.counts == {
            "no verdict": 1, "out of range": 1, "refusal": 2, "empty reply": 1, "cut at max_tokens": 1, "timeout": 1,
            "too many requests": 1, "server error": 1, "request refused": 1, "no chat completion": 1,
        }  # fmt: skip
        assert "1 × no verdict, such as row 0, student after: What a lovely day." in failures.lines()
        assert "1 × empty reply, such as row 3, student after: (nothing)" in failures.lines()
        assert "context too long" in failures.examples["request refused"]
        assert (failures.tokens_in, failures.tokens_out) == (600, 60), "six replies were paid for"
        server.questions.clear()
        server.answer = lambda text, before: Said(FINE)
        assert ask(settings, 20, tmp_path).asked == 11 and rows_of(server) == list(range(11)), "failures are no verdicts"
        assert ask(settings, 20, tmp_path).asked == 0


def test_more_failures_than_may_be_end_the_asking_at_once_and_verdicts_are_kept(tmp_path: Path) -> None:
    with serving(lambda text, before: Said(FINE if row_of(text) < 5 else "Hm.")) as server:
        settings = settings_for(server.url, concurrent=1)
        with pytest.raises(JudgeFailed, match=r"5 of 20 questions are without .*most_failures 0\.2 allows:\n  5 × no verd.*Hm"):
            ask(settings, 20, tmp_path)
        assert len(server.questions) <= 12, "what was not yet begun is not asked any more"
        server.answer = lambda text, before: Said(FINE)
        assert ask(settings, 20, tmp_path).asked == 15


def test_who_was_killed_while_asking_goes_on_with_the_rest(tmp_path: Path) -> None:
    with serving(lambda text, before: Said(FINE)) as server:
        settings = settings_for(server.url)
        ask(settings, 6, tmp_path)
        book = tmp_path / "book.jsonl"
        lines = book.read_text().splitlines(keepends=True)
        book.write_text("".join(lines[:3]) + lines[3][:50])  # what a kill in the middle of a line leaves
        server.questions.clear()
        assert ask(settings, 8, tmp_path).asked == 5 == len(server.questions)
        assert len(book.read_text().splitlines()) == 8


def test_an_interruption_keeps_what_was_said_and_asks_no_more(tmp_path: Path) -> None:
    class Interrupted:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def ask(self, text: str) -> Reply:
            self.asked.append(row_of(text))
            time.sleep(0.005)
            if row_of(text) == 3:
                raise KeyboardInterrupt
            return Reply(FINE)

    settings, judge, book = settings_for("http://h/v1", concurrent=1), Interrupted(), VerdictBook(tmp_path / "book.jsonl")
    questions = questions_for(settings, 500)
    with pytest.raises(KeyboardInterrupt):
        ask_missing(questions, book, judge, settings)
    known = {one.row for one in questions if VerdictBook(tmp_path / "book.jsonl").get(one)}
    assert len(judge.asked) < 500 and known <= set(judge.asked) - {3}


def test_a_server_that_is_not_there_is_named_with_what_would_do() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        words = rf"nothing answers at {url} \(no connection: .*refused\); start the server, .* can judge the run later"
        with closing(JudgeClient(settings_for(url, retries=0))) as client, pytest.raises(ValueError, match=words):
            client.require_answers()


def test_a_server_that_is_silent_is_named() -> None:
    with serving(lambda text, before: Said(FINE, after_seconds=1.0)) as server:
        client = JudgeClient(settings_for(server.url, retries=0, timeout_seconds=0.2))
        with closing(client), pytest.raises(ValueError, match=r"nothing answers at .* \(timeout: "):
            client.require_answers()


@pytest.mark.parametrize(("status", "known"), [(401, True), (403, True), (401, False)])
def test_a_wrong_key_is_an_error_that_does_not_show_it(monkeypatch: pytest.MonkeyPatch, status: int, known: bool) -> None:
    monkeypatch.setenv("JUDGES_OWN", SECRET)
    variable = "JUDGES_OWN" if known else None
    with serving(lambda text, before: Said(f"Incorrect API key provided: {SECRET}" if known else "no key", status)) as server:
        client = JudgeClient(settings_for(server.url, api_key_variable=variable))
        with closing(client), pytest.raises(ValueError) as raised:
            client.require_answers()
        assert server.keys == [f"Bearer {SECRET}" if known else "Bearer none"], "asked once: a wrong key does not come right"
    message = str(raised.value)
    assert re.search(r"evaluate.judge: http://\S+ refuses the key \(", message) and SECRET not in message
    assert ("Incorrect API key provided: (hidden)" in message and "environment variable JUDGES_OWN, or" in message) == known
    assert ("as evaluate.judge.api_key_variable, would do" in message) and raised.value.__cause__ is None


def test_a_model_that_is_not_served_is_named() -> None:
    with serving(lambda text, before: Said("The model `m` does not exist.", status=404)) as server:
        words = r"model 'm' is not served at .*does not exist.*/v1/models lists would do"
        with closing(JudgeClient(settings_for(server.url))) as client, pytest.raises(ValueError, match=words):
            client.require_answers()


def test_a_request_that_is_refused_says_why() -> None:
    with serving(lambda text, before: Said("temperature is not supported", status=400)) as server:
        words = r"does not take questions \(request refused: .*temperature is not supp.*=null"
        with closing(JudgeClient(settings_for(server.url))) as client, pytest.raises(ValueError, match=words):
            client.require_answers()


def test_a_key_that_is_not_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", " ")
    with pytest.raises(ValueError, match=r"api_key_variable JUDGE_KEY is not set in the environment; .*null for a server"):
        JudgeClient(settings_for("http://h/v1", api_key_variable="JUDGE_KEY"))


def test_the_address_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = JudgeConfig(model="m", api_key_variable=None)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert address_of(settings) == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://there:1/v1/")
    assert address_of(settings) == "http://there:1/v1"
    assert address_of(settings_for("http://here/v1")) == "http://here/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:{SECRET}@there/v1")
    with pytest.raises(ValueError, match="from OPENAI_BASE_URL, holds more than an address") as raised:
        address_of(settings)
    assert SECRET not in str(raised.value)


def test_the_judges_words_cannot_bring_the_key_into_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGES_OWN", SECRET)
    with serving(lambda text, before: Said(f"{SECRET}\n{FINE}" if row_of(text) else SECRET)) as server:
        asked = ask(settings_for(server.url, api_key_variable="JUDGES_OWN", most_failures=1.0), 3, tmp_path)
    assert asked.failures.examples == {"no verdict": "row 0, student after: (hidden)"}
    written = (tmp_path / "book.jsonl").read_text()
    assert written.count("(hidden)") == 2 and SECRET not in written
