"""A comparison under several teachers: what each one's run is, what is refused, and what the page says of size."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM

from actors.examples import write_examples
from orchestrator.commands import comparison
from orchestrator.config.load import ConfigError, load_config, validate
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models
from orchestrator.reports.teachers_report import (
    changes_of,
    short_number,
    teachers_headline,
    teachers_table,
    write_teachers_report,
)
from orchestrator.run.run_dir import RunDir
from orchestrator.search.analysis import TaughtBy
from orchestrator.search.compare_teachers import (
    compare_teachers,
    configs_by_teacher,
    laid_over,
    require_same_rows,
    share_finetuned_student,
)
from orchestrator.search.ledger import read_ledger
from tests.logs import logged
from tests.orchestrator.searches import EVIL, begin, run_trial
from tests.worlds import random_examples, tiny_llama, word_tokenizer

SIZES: dict[str, dict[str, int]] = {"large": {"hidden_size": 32, "layers": 2}, "small": {"hidden_size": 16, "layers": 1}}


def config_of(folder: Path, teachers: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """Two pretrained teachers and a student, on rows of words that they know."""
    for name, shape in {**SIZES, "student": SIZES["small"]}.items():
        if not (folder / name).exists():
            tiny_llama(folder / name, seed=len(name), **shape)
            tokenizer = word_tokenizer()
            tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
            tokenizer.save_pretrained(folder / name)
    words = [" ".join(f"w{token}" for token in row.token_ids) for row in random_examples(60, seed=4, longest=12)]
    rows = [json.dumps({"instruction": text, "response": text[: len(text) // 2]}) + "\n" for text in words]
    (folder / "rows.jsonl").write_text("".join(rows))
    return validate({
        "name": "sizes", "output": str(folder / "runs"),
        "data": {
            "source": {"kind": "files", "path": str(folder / "rows.jsonl")}, "heldout_rows": 12, "special_tokens": "keep",
            "format": {"kind": "instruction", "prompt": "{{ instruction }} "},
        },
        "teacher": {
            "model": {"kind": "pretrained", "name": str(folder / "small")},
            "engine": {"kind": "transformers", "dtype": "float32"},
        },
        "scores": {"top_k": 8, "rows_per_shard": 64},
        "student": {"model": {"kind": "pretrained", "name": str(folder / "student")}},
        "train": {"epochs": 2, "batch_rows": 16, "micro_batch_rows": 16, "first_epoch": "permuted"},
        "evaluate": {"generate_rows": 0},
        "compare": {
            "arms": ["forward_kl", "atkd"], "seeds": 2, "rungs": 2, "concurrent": 1, "trials_in": "reused_process",
            "teachers": {"large": {"model": {"name": str(folder / "large")}}, "small": {}} if teachers is None else teachers,
        },
        **sections,
    })  # fmt: skip


@pytest.mark.drill
@pytest.mark.ray
@pytest.mark.slow
def test_a_comparison_under_two_teachers_from_rows_to_the_page(local_ray: None, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder = config.run_dir / config.compare.name
    with logged() as said:
        assert comparison(config) == 0
    table = pyarrow.parquet.read_table(folder / "teachers.parquet").to_pylist()
    assert sorted((row["teacher"], row["arm"], row["seed"]) for row in table) == [
        (teacher, arm, seed) for teacher in ("large", "small") for arm in ("atkd", "forward_kl") for seed in (0, 1)
    ]
    assert {row["status"] for row in table} == {"completed"}
    weights = {row["teacher"]: row["teacher_weights"] for row in table}
    for teacher in SIZES:
        assert weights[teacher] == AutoModelForCausalLM.from_pretrained(tmp_path / teacher).num_parameters()
        assert (folder / teacher / "compare" / "report.html").exists()
    page = (folder / "report.html").read_text()
    for words in ("forward_kl: under large the student is", "large − small", "Student by size of its teacher"):
        assert words in page
    assert len(list((tmp_path / "runs" / "scores").iterdir())) == 4, "two stores a teacher, where a run's own would stand"
    assert any(line.startswith("large: score: ") for line in said)
    assert load_config(str(folder / "small" / "compare" / "best.yaml")).teacher == config.teacher

    with logged() as again:
        compare_teachers(config)
    assert "small: compare: resumes with 4 trials done and 0 to start again" in again
    assert not [line for line in again if "trials of" in line], "nothing was trained again"
    swapped = config_of(tmp_path, {"large": {}, "small": {}})
    with pytest.raises(ValueError, match=r"compare/large was made by another configuration(.|\n)*teacher.model.name: "):
        compare_teachers(swapped)


def test_each_teacher_has_a_run_of_its_own_and_shares_the_place_of_the_scores(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"other": {"model": {"name": "some/model"}, "engine": {"cpus": 2}}, "same": {}})
    found = configs_by_teacher(config)
    assert list(found) == ["other", "same"] and found["same"].teacher == config.teacher
    assert found["other"].teacher.model.name == "some/model"  # type: ignore[union-attr]
    assert (found["other"].teacher.engine.cpus, found["other"].teacher.engine.dtype) == (2, "float32")
    for teacher, its_config in found.items():
        assert its_config.run_dir == config.run_dir / "compare" / teacher
        assert its_config.scores.root == str((tmp_path / "runs" / "scores").resolve()) and not its_config.compare.teachers
        assert its_config.student == config.student and its_config.compare.arms == config.compare.arms


def test_a_section_that_says_its_kind_stands_for_itself() -> None:
    base = {"model": {"kind": "scratch", "layers": 2}, "engine": {"kind": "vllm", "cpus": 2}, "finetune": None}
    changes = {"model": {"kind": "pretrained", "name": "some/model"}, "engine": {"cpus": 1}}
    assert laid_over(base, changes) == {"model": changes["model"], "engine": {"kind": "vllm", "cpus": 1}, "finetune": None}
    assert laid_over(base, {}) == base


def test_a_teacher_whose_changes_make_no_configuration_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"small": {}, "wide": {"engine": {"dtipe": "bfloat16"}}})
    with pytest.raises(ConfigError, match=r"compare.teachers.wide: .*\n  teacher.engine.dtipe: .* did you mean dtype\?"):
        configs_by_teacher(config)


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"teachers": {"one": {}}}, "one stands alone; two would do, or none for the one of the section teacher"),
        ({"teachers": {"a/b": {}, "c": {}}}, "'a/b' cannot be a folder's name; letters, digits, dots and hyphens would do"),
        ({"teachers": {"a": {}, "b": {}}, "metric": "kl_to_teacher"}, "metric kl_to_teacher is measured against each"),
    ],
)
def test_what_cannot_be_compared_between_teachers_is_refused(tmp_path: Path, compare: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, compare=compare)


def prepared(folder: Path, name: str, student_vocab: int = 96, rows_seed: int = 1) -> RunConfig:
    """A run whose rows stand, with a student from scratch."""
    scratch = {"model": {"kind": "scratch", "hidden_size": 16, "layers": 1, "heads": 2}, "finetune": {"train": {"epochs": 1}}}
    config = config_of(folder, name=name, student=scratch)
    (config.run_dir / "data").mkdir(parents=True)
    for split, rows in (("train", 6), ("heldout", 2)):
        write_examples(config.run_dir / "data" / f"{split}.arrow", random_examples(rows, seed=rows_seed))
    begun = Path(Models(config, config.run_dir).begun("student").name)
    tiny_llama(begun, seed=1)
    settings = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps({**settings, "vocab_size": student_vocab}))
    return config


def test_teachers_with_other_rows_or_another_student_are_refused(tmp_path: Path) -> None:
    first = prepared(tmp_path, "first")
    require_same_rows(first, prepared(tmp_path, "same"), "first", "same")
    with pytest.raises(ValueError, match="first and other cut the rows into other tokens.*with one tokenizer, would do"):
        require_same_rows(first, prepared(tmp_path, "other", rows_seed=2), "first", "other")
    with pytest.raises(ValueError, match="knows 96 tokens under first and 128 under wide.*a pretrained student, or"):
        require_same_rows(first, prepared(tmp_path, "wide", student_vocab=128), "first", "wide")


def test_the_student_is_finetuned_once_for_all_teachers(tmp_path: Path) -> None:
    first, other = prepared(tmp_path, "first"), prepared(tmp_path, "other")
    fitted = Models(first, first.run_dir).finetuned_folder("student")
    tiny_llama(fitted, seed=5)
    torn = Models(other, other.run_dir).finetuned_folder("student")
    torn.mkdir(parents=True)
    (torn / "half").write_text("of a copy that was killed")
    share_finetuned_student(first, other, "first")
    assert {path.name for path in torn.iterdir()} == {path.name for path in fitted.iterdir()}
    assert (torn / "model.safetensors").read_bytes() == (fitted / "model.safetensors").read_bytes()
    with RunDir.open(
        other,
    ) as run_dir:
        assert run_dir.result("finetune_student") == {"copied_from": "first", "seconds": 0.0}
    (torn / "model.safetensors").write_bytes(b"its own")
    share_finetuned_student(first, other, "first")
    assert (torn / "model.safetensors").read_bytes() == b"its own", "what is there is left"


# ---- the page, from made-up ledgers


def taught(folder: Path, changes: dict[str, dict[str, float]], seeds: int = 4) -> list[TaughtBy]:
    """Teachers from the largest to the smallest; ``changes`` say by how much each arm's loss differs under each."""
    found = []
    for size, (teacher, by_arm) in enumerate(changes.items()):
        (folder / teacher).mkdir(parents=True)
        trials = [(arm, seed) for seed in range(seeds) for arm in by_arm]
        ledger = begin(folder / teacher, kind="compare", space={}, trials=len(trials), baseline="forward_kl")
        for number, (arm, seed) in enumerate(trials):
            noise = 0.001 * ((7 * seed + 3 * len(arm) + size) % 5)
            run_trial(ledger, number, {}, 2.0 + 0.01 * seed + by_arm[arm] + noise, seed=seed, arm=arm)
        weights = 1_000_000 * 4 ** (len(changes) - size)
        found.append(TaughtBy(teacher, weights, 1.5 + 0.1 * size, read_ledger(folder / teacher / "ledger.jsonl")))
    return found


CHANGES = {
    "large": {"forward_kl": 0.3, "atkd": -0.2, "decoupled": 0.0},
    "medium": {"forward_kl": 0.1, "atkd": -0.1, "decoupled": 0.0},
    "small": {"forward_kl": 0.0, "atkd": 0.0, "decoupled": 0.0},
}


def test_the_change_from_the_smallest_to_the_largest_teacher_is_told_in_words(tmp_path: Path) -> None:
    found = taught(tmp_path, CHANGES)
    by_arm = {change.arm: change for change in changes_of(found)}
    for arm, change in by_arm.items():
        values = [
            {trial.begun.seed: one.search.value(trial) for trial in one.search.trials if trial.begun.arm == arm}
            for one in (found[0], found[-1])
        ]
        assert change.mean == pytest.approx(sum(values[0][seed] - values[1][seed] for seed in range(4)) / 4)  # type: ignore[operator]
    assert {arm: change.verdict for arm, change in by_arm.items()} == {
        "forward_kl": "worse", "atkd": "better", "decoupled": "not distinguishable",
    }  # fmt: skip
    said = teachers_headline(found).sentences
    assert said[0].startswith("forward_kl: under large the student is worse than under small: +0.")
    assert said[1].startswith("atkd: under large the student is better than under small: -0.")
    assert said[2].startswith("decoupled: under large the student is not distinguishable from under small")


def test_seeds_that_one_teacher_did_not_complete_are_named_and_left_out(tmp_path: Path) -> None:
    large, small = taught(tmp_path, {teacher: CHANGES[teacher] for teacher in ("large", "small")}, seeds=3)
    shorter = taught(tmp_path / "shorter", {"small": CHANGES["small"]}, seeds=2)[0]
    (change,) = [one for one in changes_of([large, shorter]) if one.arm == "atkd"]
    assert change.seeds == (0, 1) and any("only 2 seeds in common" in note for note in change.notes)
    assert all(len(one.seeds) == 3 for one in changes_of([large, small]))


def test_the_page_and_the_table_hold_every_teacher_smallest_first(tmp_path: Path) -> None:
    found = taught(tmp_path, CHANGES)
    page = write_teachers_report(EVIL, found, tmp_path).read_text()
    assert EVIL not in page and "&lt;script&gt;document.title" in page
    assert page.index('<th scope="col" class="number">small') < page.index('<th scope="col" class="number">large')
    assert "http" not in page.replace("http://www.w3.org", ""), "nothing is fetched"
    table = teachers_table(found)
    assert list(dict.fromkeys(table["teacher"].to_pylist())) == ["small", "medium", "large"] and len(table) == 36
    assert (tmp_path / "teachers.csv").read_text().startswith('"teacher","teacher_weights","teacher_heldout_loss","rank"')


@pytest.mark.parametrize(("count", "written"), [(158_016, "158k"), (1_168_768, "1.17M"), (7.6e9, "7.6G"), (999_999, "1M")])
def test_sizes_are_written_short(count: float, written: str) -> None:
    assert short_number(count) == written
