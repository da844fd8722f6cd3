"""The judge of a run: asked once, kept, shown in table, report and results; judged again later; and no key in any file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from actors.evaluation.answers import GeneratedAnswer
from actors.evaluation.evaluator import Evaluation, Metrics
from orchestrator.cli import main
from orchestrator.config.load import ConfigError, dump_config
from orchestrator.config.run import RunConfig
from orchestrator.failure import classify
from orchestrator.judging.asking import JudgeFailed
from orchestrator.reports.run_report import write_report
from orchestrator.run.evaluation import comparison_table, write_evaluation
from orchestrator.run.judging import judge, judge_again, read_judging, require_judge
from orchestrator.run.results_table import MODEL_NAMES, markdown, read_table, write_table
from orchestrator.run.run_dir import RunDir
from tests.judge_server import TRIAL, Said, serving
from tests.logs import logged
from tests.orchestrator.config.test_run import changed
from tests.orchestrator.pages import Page, require_closed

SECRET = "key-0123456789-of-the-judge"
ROWS = 6
GRADES = {"right": 9, "teacher's": 8, "before's": 2, "after's": 6}


def asked_of(url: str, output: Path, **settings: object) -> RunConfig:
    given = {"model": "wise", "base_url": url, "api_key_variable": "JUDGES_OWN", "retries": 0, **settings}
    return changed(f"output={output}", f"evaluate.judge={json.dumps(given)}")


def answers_of(words: str, rows: int = ROWS) -> tuple[GeneratedAnswer, ...]:
    return tuple(GeneratedAnswer(row, None, f"ask {row}.", "right", f"{words} {row}.", False, None) for row in range(rows))


def evaluated(run_dir: RunDir, teacher_answers: bool = True) -> None:
    """Leave behind what the stage evaluate does."""
    (run_dir.path / "evaluation").mkdir(exist_ok=True)
    evaluations = []
    for name in MODEL_NAMES:
        words = {"teacher": "teacher's", "student_before": "before's", "student_after": "after's"}[name]
        given = answers_of(words) if teacher_answers or name != "teacher" else ()
        evaluations.append(Evaluation(Metrics(0.5, 0.25, 0.75, 0.1, 1.0, None, 1000, 7, 1.0, 2.0), given))
        write_evaluation(run_dir.path / "evaluation" / f"{name}.json", evaluations[-1])
    write_table(run_dir.path, comparison_table(*evaluations))
    run_dir.finish("evaluate", {"seconds": 1.0})


def grade(text: str) -> int:
    return next(grade for word, grade in GRADES.items() if word in text)


def rating(text: str, before: int) -> Said:
    """What the judge gives goes by the words that an answer begins with."""
    first, second = re.findall(r"--- answer [AB] ---\n(.*)\n", text) or ("right", "right")
    return Said(f"Rating A: {grade(first)}\nRating B: {grade(second)}")


def better(text: str, before: int) -> Said:
    """The better words win, but beside the teacher's whatever stands first does."""
    first, second = re.findall(r"--- answer [AB] ---\n(.*)\n", text) or ("right", "right")
    wins_first = "teacher's" in first + second or grade(first) > grade(second)
    return Said(f"Better: {'A' if wins_first else 'B'}")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGES_OWN", SECRET)


def test_ratings_join_table_report_and_results_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    with serving(rating) as server, logged() as said:
        config = asked_of(server.url, tmp_path, input_price=3.0, output_price=15.0)
        with RunDir.open(changed(f"output={tmp_path}")) as run_dir:  # begun without a judge
            evaluated(run_dir)
            judge(config, run_dir)
            assert len(server.questions) == 3 * ROWS
            judge(config, run_dir)
        assert len(server.questions) == 3 * ROWS and said[-1] == "judge: done before"
    rows = {row.metric: row for row in read_table(run_dir.path).judge}
    assert rows["judge_ratio"].values == pytest.approx((8 / 9, 2 / 9, 6 / 9))
    assert rows["judge_low"].values == rows["judge_high"].values == pytest.approx((8 / 9, 2 / 9, 6 / 9)), "all rows are alike"
    assert rows["judge_rows"].cells == ("6", "6", "6") and rows["judge_ratio"].cells == ("88.9 %", "22.2 %", "66.7 %")
    assert "| ratings, share of the reference's | 88.9 % | 22.2 % | 66.7 % |" in (run_dir.path / "table.md").read_text()
    assert "ratings, share of the reference's" in markdown(read_table(run_dir.path)), "and so in the model card"

    found = read_judging(run_dir.path)
    assert found is not None and (found.tokens_in, found.tokens_out) == (1800, 180)
    assert found.cost == pytest.approx((1800 * 3 + 180 * 15) / 1e6)
    stage = json.loads((run_dir.path / "stages" / "judge.json").read_text())
    assert (stage["verdicts"], stage["asked"], stage["failures"]) == (18, 18, {})
    assert any(re.fullmatch(r"judge: wise at [\d.:]+ judged by rating: 18 verdicts; 18 questions .*", line) for line in said)

    content = write_report(run_dir.path).read_text()
    require_closed(content)
    for words in ("Judge", "judged by rating: 18 verdicts", "1,800 tokens read and 180 written, cost 0.0081", "66.7 %"):
        assert words in Page(content).text, words


def test_pairs_are_asked_about_in_both_orders(tmp_path: Path) -> None:
    with serving(better) as server:
        config = asked_of(server.url, tmp_path, protocol="pairwise", rows=4)
        with RunDir.open(config) as run_dir:
            evaluated(run_dir)
            judge(config, run_dir)
        assert len(server.questions) == 2 * 2 * 4
    rows = {row.metric: row.values for row in read_table(run_dir.path).judge}
    assert rows["judge_win"] == (0.0, 1.0, None) and rows["judge_loss"] == (0.0, 0.0, None)
    assert rows["judge_tie"] == (1.0, 0.0, None), "the teacher's pairs go by who stands first, so they are ties"
    assert rows["judge_disagree"] == (1.0, 0.0, None) and rows["judge_rows"] == (4, 4, None)


def test_a_teacher_without_answers_is_left_out(tmp_path: Path) -> None:
    with serving(rating) as server:
        config = asked_of(server.url, tmp_path)
        with RunDir.open(config) as run_dir:
            evaluated(run_dir, teacher_answers=False)
            judge(config, run_dir)
            pairs = asked_of(server.url, tmp_path, protocol="pairwise")
            assert read_table(run_dir.path).judge[0].cells == ("–", "22.2 %", "66.7 %")
            server.answer = better
            judge(pairs, run_dir)
    assert {row.metric: row.values for row in read_table(run_dir.path).judge}["judge_win"] == (None, 1.0, None)


def test_the_command_judges_a_run_that_had_no_judge_and_asks_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = changed(f"output={tmp_path}")
    with RunDir.open(bare) as run_dir:
        evaluated(run_dir)
    path = tmp_path / "small.yaml"
    path.write_text(dump_config(bare))

    def hesitating(text: str, before: int) -> Said:
        return Said("Hm.") if "after's 3." in text and "ask 3." in text else rating(text, before)

    with serving(hesitating) as server:
        settings = f"{{model: wise, base_url: {server.url}, api_key_variable: null, retries: 0}}"
        command = ["judge", str(path), f"evaluate.judge={settings}"]
        assert main(command) == 0
        assert "without a verdict: 1 × no verdict, such as row 3, student after: Hm." in capsys.readouterr().out
        assert read_table(run_dir.path).judge[-1].values == (6, 6, 5) and len(server.questions) == 18
        server.answer = rating
        assert main(command) == 0
        assert len(server.questions) == 19 and read_table(run_dir.path).judge[-1].values == (6, 6, 6)
        assert "ratings, share of the reference's" in capsys.readouterr().out
        assert (run_dir.path / "report.html").exists()
    server.url = "gone"
    assert main(command) == 0, "all is known, so nobody is asked"
    assert "0 questions asked the last time" in capsys.readouterr().out


def test_too_many_failures_fail_the_stage_and_nothing_is_recorded(tmp_path: Path) -> None:
    with serving(lambda text, before: Said("Hm.")) as server:
        config = asked_of(server.url, tmp_path)
        with RunDir.open(config) as run_dir:
            evaluated(run_dir)
            with pytest.raises(JudgeFailed, match="4 of 18 questions are without a verdict") as raised:
                judge(config, run_dir)
            assert run_dir.result("judge") is None and read_table(run_dir.path).judge == ()
    assert classify(raised.value).exit_code == 1 and classify(raised.value).says_all


def test_the_key_is_in_no_file_that_a_judging_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def telling(text: str, before: int) -> Said:
        return Said(f"{rating(text, before).text}\nThe key was {SECRET}.") if "before's 0." not in text else Said(SECRET)

    with serving(telling) as server:
        config = asked_of(server.url, tmp_path)
        path = tmp_path / "small.yaml"
        path.write_text(dump_config(config))
        with RunDir.open(config) as run_dir:
            evaluated(run_dir)
        assert main(["judge", str(path)]) == 0
        assert set(server.keys) == {f"Bearer {SECRET}"}, "it was sent"
        server.answer = lambda text, before: Said(f"wrong key {SECRET}", status=401)
        assert main(["judge", str(path)]) == 2
    said = capsys.readouterr()
    assert "refuses the key" in said.err and SECRET not in said.err + said.out
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"verdicts.jsonl", "judge.json", "table.json", "run.log", "events.jsonl", "error.log", "report.html"} <= {
        file.name for file in files
    }
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


def test_a_run_looks_at_its_judge_before_its_time_is_spent(tmp_path: Path) -> None:
    with serving(rating) as server:
        config = asked_of(server.url, tmp_path)
        with RunDir.open(config) as run_dir:
            require_judge(config, run_dir)
            assert [one["messages"][0]["content"] for one in server.requests] == [TRIAL]
            server.answer = lambda text, before: Said("no", status=404)
            with pytest.raises(ValueError, match="evaluate.judge.model 'wise' is not served"):
                require_judge(config, run_dir)
            require_judge(changed(), run_dir)
            run_dir.finish("judge", {"seconds": 1.0})
            require_judge(config, run_dir)
    assert len(server.requests) == 2


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_a_judge_that_is_not_there_ends_a_run_before_its_rows_are_read(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(rating) as server:
        pass
    settings = f"{{model: m, base_url: {server.url}, api_key_variable: null, retries: 0}}"
    assert main([command, "configs/tiny_cpu.yaml", f"output={tmp_path}", f"evaluate.judge={settings}"]) == 2
    assert f"nothing answers at {server.url} (no connection" in capsys.readouterr().err
    assert not (tmp_path / "tiny_cpu" / "data").exists()


def test_what_cannot_be_judged_is_said(tmp_path: Path) -> None:
    here, judged = f"output={tmp_path}", "evaluate.judge={model: m, api_key_variable: null}"
    with pytest.raises(ValueError, match=r"evaluate.judge is null, so there is nobody to judge; 'evaluate.judge={model: NAME, "):
        judge_again(changed(here))
    with pytest.raises(ValueError, match=r"there is no run in .*small; the command run makes it"):
        judge_again(changed(here, judged))
    assert not (tmp_path / "small").exists()
    RunDir.open(changed(here)).close()
    with pytest.raises(ValueError, match=r"the run in .*small has no answers yet; the command evaluate makes them"):
        judge_again(changed(here, judged))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.generate_rows=0"], "generate_rows is 0, and judge needs answers to judge; generate_rows=100 would do"),
        (["evaluate.judge.rows=200"], "judge.rows 200 is more than the generate_rows 100 that are answered; judge.rows=100"),
        (["evaluate.judge.base_url=localhost:8000"], "base_url 'localhost:8000' is no address of a server; http://localhost:8000/v1"),
        (["evaluate.judge.input_price=3"], "input_price is given and output_price is null: the cost needs both; output_pr"),
        (["evaluate.judge.output_price=3"], "output_price is given and input_price is null"),
        (["evaluate.judge.protocol=ratings"], "did you mean rating?"),
    ],
)
def test_a_wrong_key_of_the_judge_is_named_with_what_would_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        changed("evaluate.judge={model: m}", *overrides)


@pytest.mark.parametrize(
    "override", [f"evaluate.judge.api_key_variable={SECRET}", f"evaluate.judge.base_url=http://me:{SECRET}@host/v1",
                 f"evaluate.judge.base_url=http://host/v1?key={SECRET}"],
)  # fmt: skip
def test_a_key_in_the_configuration_is_refused_and_not_shown(override: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.judge.\w+: .*not shown: .*secret.* would do") as raised:
        changed("evaluate.judge={model: m}", override)
    assert SECRET not in str(raised.value)


def test_a_judge_may_come_change_and_go_when_a_run_is_resumed(tmp_path: Path) -> None:
    for judged in ("null", "{model: a}", "{model: b, protocol: pairwise}", "null"):
        RunDir.open(changed(f"output={tmp_path}", f"evaluate.judge={judged}")).close()


def test_openais_package_is_imported_only_where_there_is_a_judge() -> None:
    code = "import orchestrator.commands, sys; print('openai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
