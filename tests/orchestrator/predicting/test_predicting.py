"""New rows before finished models: what is refused before any device is taken, and what is done with the others."""

import csv
import json
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import BertConfig, PreTrainedTokenizerFast

import actors.models  # noqa: F401  # transformers then finds small classifiers too
from actors.storage.mirror import Mirror, folder_on_nodes
from orchestrator.config.formats import InstructionFormat
from orchestrator.config.load import apply_override, load_run, validate
from orchestrator.config.run import RunConfig
from orchestrator.data.grading import make_graded_answers
from orchestrator.data.mixture import numbered
from orchestrator.models.models import Models
from orchestrator.predicting.answer_file import AnswerFile
from orchestrator.predicting.answering import Answer, choose_engine, devices_needed
from orchestrator.predicting.options import PredictOptions
from orchestrator.predicting.predicting import Asked, answer_rows, predict, read_new_rows, target_of
from orchestrator.predicting.questions import Question, class_questions, format_of_rows, text_questions
from orchestrator.run.run_dir import result_path
from tests.logs import logged
from tests.orchestrator.predicting.finished_runs import GRADING, LANGUAGE, finished, images, jsonl
from tests.s3_world import BUCKET, faulty_storage, s3_server

ASKED = [{"question": row["question"], "answer": row["answer"]} for row in make_graded_answers(30, seed=5)]
PROMPTS = [{"instruction": "Add 3 and 4.", "input": ""}]


@pytest.fixture(scope="module")
def grading(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return finished(tmp_path_factory.mktemp("grading"), GRADING)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return finished(tmp_path_factory.mktemp("language"), LANGUAGE)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return images(tmp_path_factory.mktemp("images"))


def refused(config: RunConfig, rows: str, **said: Any) -> str:
    """Return in what words predict refuses, with no Ray in sight."""
    with pytest.raises(ValueError) as error:
        predict(config, config.run_dir, PredictOptions(rows, **said))
    return str(error.value)


# ---- files of rows


def test_rows_come_from_any_kind_of_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ASKED)
    (tmp_path / "a.json").write_text(json.dumps(ASKED))
    pq.write_table(pa.Table.from_pylist(ASKED), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ASKED)
    for kind in ("jsonl", "json", "parquet", "csv"):
        assert [row.fields for row in read_new_rows(tmp_path / f"a.{kind}")] == ASKED


@pytest.mark.parametrize(
    ("rows", "target"), [("a.jsonl", "a.predicted.jsonl"), ("d/a.b.csv.gz", "d/a.b.predicted.jsonl")]
)  # fmt: skip
def test_answers_stand_beside_the_rows_unless_told_otherwise(rows: str, target: str) -> None:
    assert target_of(PredictOptions(rows)) == Path(target)
    assert target_of(PredictOptions(rows, output="x.jsonl")) == Path("x.jsonl")


def test_files_that_hold_no_rows_are_named(grading: RunConfig, tmp_path: Path) -> None:
    missing = refused(grading, str(tmp_path / "gone.jsonl"))
    assert re.match(
        r"ROWS .*gone\.jsonl: there is no file /.*gone\.jsonl; one that ends in \.jsonl, .*\.csv\.gz would do$", missing
    )
    (tmp_path / "empty.jsonl").write_text("\n")
    assert refused(grading, str(tmp_path / "empty.jsonl")).endswith("empty.jsonl: the file holds no rows")
    (tmp_path / "rows.txt").write_text("x")
    assert "files of the kind '.txt' cannot be read as rows; .jsonl, .json" in refused(grading, str(tmp_path / "rows.txt"))


# ---- runs


def test_a_run_is_named_by_its_file_or_by_its_folder_wherever_that_is_now(grading: RunConfig, tmp_path: Path) -> None:
    config, folder = load_run(grading.run_dir)
    assert folder == grading.run_dir and config == grading
    moved = shutil.copytree(grading.run_dir, tmp_path / "moved")
    assert load_run(moved, ["evaluate.batch_rows=3"])[0].evaluate.batch_rows == 3 and load_run(moved)[1] == moved.resolve()
    assert load_run("configs/tiny_cpu.yaml")[1] == load_run("configs/tiny_cpu.yaml")[0].run_dir
    with pytest.raises(ValueError, match=r"^the folder .* holds no config\.yaml, so no run has made it; a run's own folder"):
        load_run(tmp_path)


def test_a_run_in_object_storage_is_named_by_its_address_and_copied_to_this_node(grading: RunConfig, tmp_path: Path) -> None:
    with s3_server(tmp_path) as endpoint, faulty_storage(tmp_path, endpoint):
        address = f"s3://{BUCKET}/runs/grading"
        Mirror(str(shutil.copytree(grading.run_dir, tmp_path / "made")), address).sync()
        config, folder = load_run(f"{address}/")
        assert config == grading and folder == folder_on_nodes(address)
        assert (folder / "student" / "model.safetensors").is_file()
        with pytest.raises(ValueError, match=rf"^the folder s3://{BUCKET}/runs/none holds no config\.yaml, so no run has"):
            load_run(f"s3://{BUCKET}/runs/none")


def test_runs_that_cannot_answer_are_named_with_the_command_that_would_do(grading: RunConfig, tmp_path: Path) -> None:
    rows, elsewhere = jsonl(tmp_path / "rows.jsonl", ASKED), grading.model_copy(update={"name": "another"})
    assert refused(elsewhere, rows).endswith("another; the command run makes it, and ends in a student that answers")
    unexported = shutil.copytree(grading.run_dir, tmp_path / "unexported")
    config, folder = load_run(unexported)
    result_path(folder, "export").unlink()
    with pytest.raises(ValueError, match=r"^the run in .*unexported has no exported student yet; the command export makes it$"):
        predict(config, folder, PredictOptions(rows))
    assert refused(grading, rows, model="teacher").endswith("no teacher yet that answers; the command finetune makes it")
    tree = grading.model_dump(mode="json")
    apply_override(tree, "data.format.text='{{ answer }}'")
    assert re.search(
        r"was made by another configuration, .*leave this out:\n  data\.format\.text: ", refused(validate(tree), rows)
    )


def test_teachers_that_read_no_rows_are_named(seeing: RunConfig, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", [{"image": [[0] * 4] * 4}])
    assert refused(seeing, rows, model="teacher") == (
        "the teacher is a table that knows labels and no rows (soft_labels); --model student would do"
    )
    words = {"model": {"kind": "pretrained", "name": str(tmp_path)}, "label_words": {"prompt": "{{ answer }} is"}}
    config = validate({**GRADING, "output": str(tmp_path), "teacher": words})
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    assert refused(config, rows, model="teacher").startswith(
        "the teacher answers with label words, of which predict knows nothing"
    )


def test_a_place_for_the_answers_is_looked_at_first(grading: RunConfig, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", ASKED)
    assert "there is no folder" in refused(grading, rows, output=str(tmp_path / "gone" / "a.jsonl"))
    assert refused(grading, rows, output=rows, overwrite=True).endswith("is the file of the rows itself; another file would do")
    (tmp_path / "rows.predicted.jsonl").write_text("old\n")
    assert "is there already; --overwrite would replace it" in refused(grading, rows)


# ---- rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, r"row 1: data\.format\.text cannot be filled in: 'question' is undefined; its fields are 'answer'"),
        ({"question": " ", "answer": ""}, r"row 1: its text is empty: there is nothing to classify"),
    ],
)
def test_a_row_without_what_is_classified_is_named(grading: RunConfig, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", [ASKED[0], row])
    assert re.match(re.escape(rows) + ": " + message, refused(grading, rows))


def test_an_image_of_another_size_is_named(seeing: RunConfig, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", [{"image": [[0] * 4] * 4}, {"image": [[0] * 4] * 5}])
    assert refused(seeing, rows) == (
        f"{rows}: row 1: its image has the shape [1, 5, 4], and the model learned from those of [1, 4, 4]; an image of that size "
        "would do"
    )


def test_what_is_for_language_models_is_refused_of_classifiers(grading: RunConfig, tmp_path: Path) -> None:
    assert refused(grading, jsonl(tmp_path / "rows.jsonl", ASKED), temperature=1.0).startswith(
        "--temperature 1.0 is for language"
    )


def test_texts_are_cut_where_training_cut_them_and_whole_elsewhere(grading: RunConfig) -> None:
    long = numbered([{"question": "Why does ice float?", "answer": "Because ice is less dense. " * 30}])
    models = Models(grading, grading.run_dir)
    arguments = (grading.data.format, models, "student", grading.run_dir)
    (whole,) = class_questions(long, grading, *arguments)  # type: ignore[arg-type]
    assert len(whole.token_ids) > grading.data.max_tokens
    cutting = grading.model_copy(update={"data": grading.data.model_copy(update={"too_long": "truncate"})})
    (cut,) = class_questions(long, cutting, *arguments)  # type: ignore[arg-type]
    assert cut.token_ids.tolist() == whole.token_ids[: grading.data.max_tokens - 1].tolist()


def test_prompts_beyond_the_window_are_named_with_what_would_do(language: RunConfig, tmp_path: Path) -> None:
    window, said = language.longest_text, {"engine": "transformers"}
    long = jsonl(tmp_path / "long.jsonl", [*PROMPTS, {"instruction": "7" * window, "input": ""}])
    assert refused(language, long, **said) == (
        f"{long}: row 1: its prompt has {window + 1} tokens, and the student knows {window} positions, which leaves none for an "
        f"answer; a prompt of {window - 12} tokens would do"
    )
    near = jsonl(tmp_path / "near.jsonl", [{"instruction": "7" * (window - 8), "input": ""}])
    assert refused(language, near, **said) == (
        f"{near}: row 0: its prompt has {window - 7} tokens, evaluate.max_new_tokens is 12, and the student knows {window} "
        "positions; --max-new-tokens 7 would do"
    )
    assert ", --max-new-tokens is 8, and" in refused(language, near, max_new_tokens=8, **said)


def test_a_run_of_several_formats_asks_which(tmp_path: Path) -> None:
    formats = ({"kind": "instruction"}, {"kind": "chat"})
    sources = [{"source": {"kind": "builtin"}, "format": format} for format in formats]
    data = validate({**LANGUAGE, "data": {"sources": sources}}).data
    with pytest.raises(
        ValueError, match=r"in several formats \(data\.sources\.0 instruction, data\.sources\.1 chat\), .*--format-of"
    ):
        format_of_rows(data, None)
    assert format_of_rows(data, "data.sources.1").kind == "chat"
    with pytest.raises(ValueError, match=r"^--format-of x is no source of the run; data\.sources\.0, data\.sources\.1 would do$"):
        format_of_rows(data, "x")


# ---- engines and devices


def test_vllm_is_taken_where_it_serves_and_said_where_not(language: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(language, language.run_dir)

    def chosen(build: str | None, *overrides: str, **said: Any) -> str:
        monkeypatch.setattr("orchestrator.predicting.answering.installed_vllm", lambda: build)
        tree = language.model_dump(mode="json")
        for override in overrides:
            apply_override(tree, override)
        return choose_engine(validate(tree), models, "student", PredictOptions("r", **said)).kind

    with logged() as lines:
        assert chosen("cpu") == "transformers" and chosen(None) == "transformers" and chosen("gpu", "evaluate.gpus=1") == "vllm"
    assert lines == [
        "predict: answered by transformers, since the student has heads of size 16, for which vLLM has no kernel on CPUs",
        "predict: answered by transformers, since no vLLM is installed",
    ]
    with pytest.raises(ValueError, match=r"^--engine vllm: no vLLM is installed; --engine transformers would do$"):
        chosen(None, engine="vllm")
    with pytest.raises(
        ValueError, match=r"^--engine vllm: the vLLM that is installed is built for CPUs \(evaluate\.gpus 1\); --engine"
    ):
        chosen("cpu", "evaluate.gpus=1", engine="vllm")
    assert chosen("gpu", "evaluate.gpus=1", engine="transformers") == "transformers"


def test_a_run_of_many_gpus_is_asked_on_a_machine_without(tmp_path: Path) -> None:
    on_gpus = {
        "engine": {"kind": "vllm", "gpu": True, "replicas": 8},
        "model": LANGUAGE["teacher"]["model"],
        "finetune": {"train": {}},
    }
    config = validate({**LANGUAGE, "teacher": on_gpus, "workers": {"count": 8, "gpus": 1}, "output": "elsewhere"})
    needed = devices_needed(config, tmp_path / "run")
    assert not needed.teacher.engine.gpu and needed.workers.gpus == 0 and needed.evaluate == config.evaluate
    assert needed.run_dir == tmp_path / "run"


# ---- answers


class Echo:
    """Answers with the row's number, and counts whom it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked.append([question.row for question in questions])
        return [{"row": question.row} for question in questions]


def test_rows_are_answered_batch_by_batch_and_only_once(tmp_path: Path) -> None:
    asked = Asked([Question(row, np.zeros(1, np.int32)) for row in range(7)], {}, 3, nullcontext(Echo()))

    def failing(questions: Sequence[Question]) -> list[Answer]:
        if questions[0].row:
            raise RuntimeError("the power is gone")
        return Echo()(questions)

    with pytest.raises(RuntimeError), AnswerFile(tmp_path / "a.jsonl", {}) as file:
        answer_rows(asked, failing, file, "student")
    echo = Echo()
    with logged() as lines, AnswerFile(tmp_path / "a.jsonl", {}) as file:
        answer_rows(asked, echo, file, "student")
    assert echo.asked == [[3, 4, 5], [6]]
    assert (tmp_path / "a.jsonl").read_text() == "".join(f'{{"row": {row}}}\n' for row in range(7))
    assert re.match(r"predict: 4 rows answered by the student in \d+\.\d s, [\d,.]+ rows/s$", lines[-1])


def test_a_text_beyond_the_window_of_a_classifier_is_named(grading: RunConfig, tmp_path: Path) -> None:
    config, folder = load_run(shutil.copytree(grading.run_dir, tmp_path / "run"))
    BertConfig(max_position_embeddings=16).save_pretrained(folder / "student")  # alone it says how far the student reads
    rows = numbered([{"question": "Why?", "answer": "So."}, {"question": "Why?", "answer": "7" * 30}])
    message = r"^row 1: its text has \d\d tokens, and the student reads 16; a text of 16 tokens would do$"
    with pytest.raises(ValueError, match=message):
        class_questions(rows, config, config.data.format, Models(config, folder), "student", folder)


def test_a_prompt_that_no_token_stands_for_is_named(language: RunConfig) -> None:
    knows_a = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "e": 1}, [])), eos_token="e")
    format = InstructionFormat(kind="instruction", prompt="{{ asked }}")
    with pytest.raises(ValueError, match=r"^row 1: its prompt 'b' has no token by the tokenizer: there is nothing to answer$"):
        text_questions(numbered([{"asked": "aa"}, {"asked": "b"}]), language.data, format, knows_a)
