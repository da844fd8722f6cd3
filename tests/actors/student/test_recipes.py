"""The recipes of docs/on_policy.md: each is a configuration, and a student learns by it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from actors.model_source import ModelSource
from orchestrator.config.load import load_config
from tests.actors.rollouts.mixed_world import mixed_writers
from tests.actors.student.test_on_policy import STEPS, Run, _one_load_at_a_time  # noqa: F401

RECIPES = re.findall(r"^\| ([^|`]+) \| `((?:loss|responses|rollouts)=[^|]*)` \|$", Path("docs/on_policy.md").read_text(), re.M)


@pytest.mark.parametrize(("recipe", "overrides"), RECIPES, ids=[recipe for recipe, _ in RECIPES])
def test_each_recipe_of_the_page_is_a_configuration_that_a_student_learns_by(tmp_path: Path, recipe: str, overrides: str) -> None:
    config = load_config("configs/tiny_cpu.yaml", re.split(r" (?=responses=|rollouts=)", overrides))
    if config.rollouts is None:
        assert "data" in recipe or "teacher's text" in recipe
        return
    asked = config.rollouts
    settings = {key: getattr(asked, key) for key in ("student_share", "teacher_share", "refresh_steps", "inner_epochs", "replay")}
    run = Run(tmp_path, loss=config.loss, top_k=8, adaptive=asked.adaptive_share, learning_rate=0.3, **settings)
    if asked.teacher_share:
        run.samplers = mixed_writers(run.spec, ModelSource(str(run.teacher_folder)), asked.teacher_share)  # type: ignore[assignment]
    run.go()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics" / "train.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS * asked.inner_epochs and np.isfinite(losses).all()


def test_the_page_has_recipes() -> None:
    assert len(RECIPES) == 13
