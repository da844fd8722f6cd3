"""What predict may be told, and what a user is told of what it may not."""

from typing import Any

import pytest

from orchestrator.cli import build_parser
from orchestrator.predicting.options import PredictOptions


def test_nothing_but_the_rows_need_be_said() -> None:
    PredictOptions("rows.jsonl").require_sound()
    PredictOptions("rows.jsonl").require_for_classes()
    PredictOptions("rows.jsonl", temperature=0.7, top_p=0.9, seed=3, max_new_tokens=1, batch_rows=1).require_sound()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"temperature": -0.5}, r"--temperature -0\.5 is none: 0 takes the most likely token, and 1 draws"),
        ({"temperature": float("nan")}, r"--temperature nan is none"),
        ({"top_p": 0.0, "temperature": 1.0}, r"--top-p 0 is no share of the mass above 0; 0\.9 would do"),
        ({"top_p": 1.5, "temperature": 1.0}, r"--top-p 1\.5 is no share"),
        ({"seed": -1, "temperature": 1.0}, r"--seed -1 is not from 0 to \d+; 0 would do"),
        (
            {"top_p": 0.9},
            r"--top-p 0\.9 says how tokens are drawn, and at --temperature 0, .* none are; --temperature 1 would do",
        ),
        ({"seed": 3, "temperature": 0.0}, r"--seed 3 says how tokens are drawn"),
        ({"batch_rows": 0}, r"--batch-rows 0 is below 1, the least that would do"),
        ({"max_new_tokens": 0}, r"--max-new-tokens 0 is below 1, the least that would do"),
    ],
)
def test_values_that_cannot_be_are_named(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        PredictOptions("rows.jsonl", **said).require_sound()


@pytest.mark.parametrize("name", ["engine", "temperature", "max_new_tokens"])
def test_classifiers_are_told_nothing_about_sampling(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^--{name.replace('_', '-')} 1 is for language models, and task\.kind is classification"
    ):
        PredictOptions("rows.jsonl", **{name: 1}).require_for_classes()  # type: ignore[arg-type]


def test_the_command_line_has_each_option() -> None:
    words = [
        "predict",
        "runs/x",
        "rows.csv",
        "seed=1",
        "--temperature",
        "-1",
        "--top-p",
        "0.5",
        "--overwrite",
        "--model",
        "teacher",
    ]
    options = build_parser().parse_args(words)
    said = PredictOptions(**{name: getattr(options, name) for name in PredictOptions.__dataclass_fields__})
    assert (options.config, options.overrides) == ("runs/x", ["seed=1"])
    assert said == PredictOptions("rows.csv", model="teacher", overwrite=True, temperature=-1.0, top_p=0.5)
