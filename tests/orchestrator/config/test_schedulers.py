"""The key ``tune.scheduler``: a name, or a scheduler of Ray Tune with arguments, which are those that Ray Tune takes."""

import inspect
from typing import Any

import pytest
from pydantic import ValidationError
from ray.tune.schedulers import SCHEDULER_IMPORT

from losses.section import Section
from orchestrator.config.load import ConfigError, dump_config, load_config
from orchestrator.config.schedulers import NATIVE, REFUSED, SET_BY_SEARCH, AsyncHyperBand, MedianStopping
from orchestrator.config.tune import TuneConfig

SECTIONS: dict[str, type[Section]] = {"async_hyperband": AsyncHyperBand, "median_stopping_rule": MedianStopping}
ALIASES = {"asynchyperband", "medianstopping"}
IN_RUNGS = {("median_stopping_rule", "grace_period")}
"""Arguments whose default of Ray Tune is in seconds."""


def test_every_scheduler_of_ray_tune_is_taken_or_refused() -> None:
    assert tuple(SECTIONS) == NATIVE
    assert {*NATIVE, *REFUSED, *ALIASES} == set(SCHEDULER_IMPORT)


@pytest.mark.parametrize("name", NATIVE)
def test_arguments_and_defaults_are_those_of_ray_tune(name: str) -> None:
    parameters = inspect.signature(SCHEDULER_IMPORT[name]).parameters
    fields = {field: info for field, info in SECTIONS[name].model_fields.items() if field != "kind"}
    assert set(fields) == set(parameters) - set(SET_BY_SEARCH)
    for field, info in fields.items():
        assert (name, field) in IN_RUNGS or info.default == parameters[field].default
        assert info.annotation in (int, float) and info.description


def test_what_the_search_sets_is_an_argument_of_a_scheduler() -> None:
    taken = {argument for name in NATIVE for argument in inspect.signature(SCHEDULER_IMPORT[name]).parameters}
    assert set(SET_BY_SEARCH) <= taken


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("asha", "asha"),
        ("none", "none"),
        ("async_hyperband", AsyncHyperBand(kind="async_hyperband")),
        ({"kind": "async_hyperband", "reduction_factor": 2}, AsyncHyperBand(kind="async_hyperband", reduction_factor=2)),
        ({"kind": "median_stopping_rule", "grace_period": 2}, MedianStopping(kind="median_stopping_rule", grace_period=2)),
    ],
)
def test_a_scheduler_is_a_name_or_a_mapping_and_is_read_back(written: Any, read: Any) -> None:
    config = TuneConfig(scheduler=written)
    assert config.scheduler == read
    assert TuneConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_scheduler_with_arguments_comes_through_a_file(tmp_path: Any) -> None:
    overrides = ["tune.scheduler.kind=async_hyperband", "tune.scheduler.reduction_factor=2"]
    config = load_config("configs/search_cpu.yaml", overrides)
    assert config.tune.scheduler == AsyncHyperBand(kind="async_hyperband", reduction_factor=2)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("ahsa", r"tune\.scheduler: there is no scheduler 'ahsa'; did you mean asha\? there are asha, median, none, async_hyper"),
        ("{kind: median_stopping}", r"there is no scheduler 'median_stopping'; did you mean median_stopping_rule\? there are"),
        ("3", r"there is no scheduler 3; there are asha"),
        ("{kind: [1]}", r"there is no scheduler \[1\]; there are asha"),
        ("{grace_period: 2}", r"scheduler: needs kind, one of async_hyperband, median_stopping_rule; got \{'grace_period': 2\}"),
        ("{kind: asha}", r"scheduler asha is written as a name alone; asha's reduction is tune\.reduction"),
        ("hyperband", r"scheduler hyperband of Ray Tune pauses trials, .* no checkpoint to resume from; async_hyperband halves"),
        ("{kind: hb_bohb, max_t: 4}", r"scheduler hb_bohb of Ray Tune pauses trials.*async_hyperband with search tpe would do"),
        ("pbt", r"scheduler pbt of Ray Tune hands weights from trial to trial.*async_hyperband would do"),
        ("pbt_replay", r"scheduler pbt_replay of Ray Tune changes a trial's settings.*none would do"),
        ("pb2", r"scheduler pb2 of Ray Tune hands weights.*async_hyperband with search tpe would do"),
        ("{kind: resource_changing}", r"scheduler resource_changing of Ray Tune changes what trials hold.*async_hyperband"),
        ("fifo", r"scheduler fifo of Ray Tune stops no trial; none would do"),
        ("{kind: async_hyperband, redction_factor: 3}", r"redction_factor: there is no such key; did you mean reduction_factor"),
        ("{kind: median_stopping_rule, brackets: 3}", r"scheduler\.brackets: does not go with median_stopping_rule"),
        ("{kind: async_hyperband, reduction_factor: 1}", r"scheduler\.reduction_factor: Input should be greater than 1; got 1"),
        ("{kind: async_hyperband, grace_period: x}", r"scheduler\.grace_period: Input should be a valid integer.*got 'x'"),
        ("{kind: async_hyperband, grace_period: 4}", r"stops no trial before rung 4, its grace_period, and rungs is 4"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_do(scheduler: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("configs/search_cpu.yaml", [f"tune.scheduler={scheduler}"])


@pytest.mark.parametrize(("argument", "reason"), SET_BY_SEARCH.items())
def test_what_the_search_sets_is_refused_with_the_reason(argument: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=rf"{argument} is set by the search: {reason}; leave it out"):
        TuneConfig(scheduler={"kind": "median_stopping_rule", argument: 1})  # type: ignore[arg-type]


def test_one_rung_leaves_a_native_scheduler_nothing_to_stop() -> None:
    with pytest.raises(ValidationError, match="scheduler async_hyperband stops trials between rungs, and rungs is 1"):
        TuneConfig(scheduler="async_hyperband", rungs=1)  # type: ignore[arg-type]
