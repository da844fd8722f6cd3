"""What a run may say whose teacher is a table of similar tokens."""

import pytest

from orchestrator.commands import doctor
from orchestrator.config.load import ConfigError, load_config
from orchestrator.config.run import RunConfig

SIMILAR = ["teacher.similar_tokens={}", "teacher.engine.kind=transformers", "evaluate.teacher=scores", "loss={kind: coupled}"]


def tiny(*overrides: str) -> RunConfig:
    return load_config("configs/tiny_cpu.yaml", [*SIMILAR, *overrides])


def test_it_stands_beside_what_needs_no_predictions() -> None:
    settings = tiny().teacher.similar_tokens
    assert settings is not None and (settings.smoothing, settings.temperature) == (0.1, 0.1)
    assert tiny("loss={kind: atkd, split: random}").loss.kind == "atkd"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.engine.kind=vllm", r"teacher\.engine\.kind vllm serves predictions, .*; teacher\.engine\.kind=transfo"),
        ("evaluate.teacher=model", r"evaluate\.teacher model measures a model that does not teach .*; evaluate\.teacher=scor"),
        ("rollouts={student_share: 0.5}", r"rollouts has a teacher judge what the student writes, .*; rollouts=null would do"),
        ("loss={kind: atkd}", r"loss\.kind atkd splits tokens by the teacher's uncertainty, .* is 0\.1 everywhere; loss"),
        ("teacher.similar_tokens={smoothing: 1}", r"teacher\.similar_tokens\.smoothing: Input should be less than 1; got 1"),
        ("teacher.similar_tokens={temperature: 0}", r"teacher\.similar_tokens\.temperature: Input should be greater than 0"),
    ],
)
def test_what_needs_predictions_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(override)


def test_doctor_is_for_teachers_that_predict() -> None:
    with pytest.raises(ValueError, match=r"doctor looks whether served predictions .*; the command run would do"):
        doctor(tiny())
