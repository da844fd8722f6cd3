"""What a user may write of a student that is cut from the teacher, and what a user is told."""

import pytest

from actors.config.model_kinds import CutModel
from orchestrator.config.load import ConfigError, config_difference, validate
from tests.orchestrator.config.test_run import changed

DEEP = "teacher.model.layers=6"


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("{kind: cut, layers: 3}", 3),
        ("{kind: cut, layers: 3, choose: first_and_last}", 3),
        ("{kind: cut, layers: 2, choose: least_influence, influence_rows: 8}", 2),
        ("{kind: cut, layers: [0, 2, 5]}", 3),
    ],
)
def test_a_student_of_the_teachers_layers_is_read_and_survives_being_written(model: str, count: int) -> None:
    config = changed(DEEP, f"student.model={model}")
    assert isinstance(config.student.model, CutModel) and config.student.model.count == count
    assert validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.model={kind: cut}"], r"student\.model\.layers: is missing"),
        (["student.model={kind: cut, layers: ten}"], r"student\.model\.layers: 'ten' is neither a number of layers nor a list"),
        (["student.model={kind: cut, layers: true}"], r"student\.model\.layers: True is neither.*10 would do, or \[0, 1, 5, 9\]"),
        (["student.model={kind: cut, layers: 0}"], r"student\.model\.layers: 0 keeps no layer of the teacher; 1 is the least"),
        (["student.model={kind: cut, layers: -2}"], r"student\.model\.layers: -2 keeps no layer of the teacher; 1 is the least"),
        (["student.model={kind: cut, layers: []}"], r"student\.model\.layers: \[\] keeps no layer of the teacher; \[0\] is"),
        (["student.model={kind: cut, layers: [0, 3, 3]}"], r"layers: \[0, 3, 3\] has 3 twice, .*; \[0, 3\] would do"),
        (["student.model={kind: cut, layers: [0, -1]}"], r"layers: \[0, -1\] has -1, .* counted from 0.*; \[0\] would do"),
        (["student.model={kind: cut, layers: [3, 0, 1]}"], r"layers: \[3, 0, 1\] is not in the .* order.*\[0, 1, 3\] would"),
        (
            ["student.model={kind: cut, layers: [0, 6, 9]}"],
            r"student\.model\.layers names 9, and the teacher's 6 layers are 0 to 5; \[0, 5\] would do",
        ),
        (["student.model={kind: cut, layers: 6}"], r"layers keeps 6, and the teacher has 6 .*: nothing would be cut; 3 would do"),
        (["student.model={kind: cut, layers: 9}"], r"layers keeps 9, and the teacher has 6 .*: nothing would be cut; 3 would do"),
        (["student.model={kind: cut, layers: [0, 1, 2, 3, 4, 5]}"], r"layers keeps 6, and the teacher has 6 layers"),
        (
            ["student.model={kind: cut, layers: 1}", "teacher.model.layers=1"],
            r"the teacher has one layer, without which nothing is left; student\.model\.kind=scratch would do",
        ),
        (
            ["student.model={kind: cut, layers: [0, 1], choose: evenly}"],
            r"student\.model: choose is 'evenly', but layers \[0, 1\] names each .*: leave choose out, or say layers=2",
        ),
        (["student.model={kind: cut, layers: 2, choose: even}"], r"choose: there is no 'even'; did you mean evenly\?"),
        (["student.model={kind: cut, layers: 2, influence_rows: 0}"], r"influence_rows: Input should be greater than"),
        (["teacher.model={kind: cut, layers: 2}"], r"teacher\.model: kind is cut, .*; kind pretrained or scratch would do"),
        (["student.model={kind: cut, layers: 2}", "tokenizer=null"], r"the student cut from it, and tokenizer is null: add a"),
        (
            ["student.model={kind: cut, layers: 2}", "compare.teachers={small: {}, large: {}}"],
            r"compare\.teachers teaches one student by several teachers, and student\.model\.kind is cut",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_by_key_and_value(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(DEEP, *overrides)


def test_other_layers_are_another_run() -> None:
    three, four = (changed(DEEP, f"student.model={{kind: cut, layers: {count}}}").model_dump(mode="json") for count in (3, 4))
    assert config_difference(three, four) == ["student.model.layers: 3 here, 4 there"]
