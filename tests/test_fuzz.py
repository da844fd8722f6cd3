"""Rubbish of every kind into the three readers of what others wrote: configurations, data sets, score stores.

Each ends in something sound or in an error of ours that says where, never in another exception, and never in other scores.
The inputs are the same in every run, so that a failure comes back; ``FUZZ_TIMES=50`` tries fifty times as many.
"""

import copy
import json
import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.examples import ExampleFile
from actors.score_store.store import ScoreStore
from orchestrator.config.data import DataConfig
from orchestrator.config.load import ConfigError, apply_override, dump_config, load_config, validate
from orchestrator.data.dataset import prepare_data
from orchestrator.data.sources import read_file
from tests.worlds import scored_world, word_tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def tries(count: int) -> settings:
    return settings(
        max_examples=count * TIMES,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=8),
    st.sampled_from(["", "auto", "vllm", "../..", "/", "~", "{{", "{% x %}", "a/b", "-1", "1e400", "nan", "\x00", "\ud800"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)  # fmt: skip


# ---- configurations


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of mappings and lists, but the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


TREES = [yaml.safe_load(path.read_text()) for path in CONFIGS]
WHOLE = [yaml.safe_load(dump_config(load_config(path))) for path in CONFIGS]
KEYS = sorted({str(key) for tree in WHOLE for path in places(tree) for key in path[-1:]})


@st.composite
def broken_trees(draw: st.DrawFn) -> dict[str, Any]:
    """A real configuration with one to three things done to it."""
    tree = copy.deepcopy(draw(st.sampled_from(TREES + WHOLE)))
    for _ in range(draw(st.integers(1, 3))):
        where = list(places(tree))
        if not where:
            break
        *way, last = draw(st.sampled_from(where))
        inner = tree
        for key in way:
            inner = inner[key]
        harm = draw(st.sampled_from(["replace", "delete", "rename", "add", "move"]))
        if harm == "replace" or not isinstance(inner, dict):
            inner[last] = draw(VALUES)
        elif harm == "delete":
            del inner[last]
        elif harm == "rename":
            inner[draw(st.sampled_from(KEYS) | st.text(max_size=8))] = inner.pop(last)
        elif harm == "add":
            inner[draw(st.sampled_from(KEYS) | st.text(max_size=8))] = draw(VALUES)
        else:
            inner[last] = copy.deepcopy(draw(st.sampled_from(list(tree.values()))))
    return tree


@tries(1500)
@given(broken_trees())
def test_a_broken_configuration_is_refused_in_words_or_is_sound(tree: dict[str, Any]) -> None:
    try:
        config = validate(tree)
    except ConfigError as error:
        assert str(error).startswith("the configuration cannot be used:\n  ") and "pydantic" not in str(error)
        return
    assert validate(yaml.safe_load(dump_config(config))) == config, "what is accepted can be written down and read back"


@tries(700)
@given(st.sampled_from(TREES), st.sampled_from(KEYS) | st.text(max_size=12), SCALARS | st.text(string.printable, max_size=12))
def test_any_override_is_refused_in_words_or_is_sound(tree: dict[str, Any], key: str, value: Any) -> None:
    tree = copy.deepcopy(tree)
    for override in (f"{key}={value}", f"train.{key}={value}", f"{value}", f"loss.{key}=[{value}, {{{value}: "):
        try:
            apply_override(tree, override)
            validate(tree)
        except ConfigError as error:
            assert str(error)


@tries(700)
@given(st.data())
def test_any_bytes_in_the_place_of_a_configuration_are_refused_in_words(tmp_path: Path, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(CONFIGS)).read_bytes()
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 40)))
    path = tmp_path / "broken.yaml"
    path.write_bytes(text[:start] + data.draw(st.binary(max_size=30)) + text[stop:])
    try:
        load_config(path)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "{a: " * 5000, f"a: {'9' * 5000}", "a: 2001-13-45", "&a [*a]", "a: &x [*x]", "\0", "a: !!python/name:os.system"],
)
def test_a_configuration_made_to_hurt_is_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "hurts.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "hurts.yaml")


# ---- data sets

ROWS = st.dictionaries(st.sampled_from(["instruction", "input", "response", "messages", "text", "x"]), VALUES, max_size=4)
JSON_TEXTS = st.lists(ROWS.map(lambda row: json.dumps(row)) | VALUES.map(lambda value: json.dumps(value)), max_size=5)
FORMATS: list[dict[str, Any]] = [
    {"kind": "instruction"},
    {"kind": "chat", "template": "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"},
]


def prepare(path: Path, folder: Path, data_format: dict[str, Any]) -> None:
    """Read a file as the rows of a run; whatever is wrong with it is a ValueError that can be read."""
    folder.mkdir(exist_ok=True)
    config = DataConfig.model_validate(
        {"source": {"kind": "files", "path": str(path)}, "heldout_rows": 1, "max_tokens": 32, "format": data_format}
    )
    try:
        prepare_data(config, lambda texts: word_tokenizer(), folder)
    except ValueError as error:
        assert str(error)
        return
    assert len(ExampleFile(folder / "train.arrow")) > 0


@tries(400)
@given(JSON_TEXTS, st.sampled_from(FORMATS), st.sampled_from(["\n", "\r\n", "\n\n", " "]))
def test_any_lines_in_the_place_of_rows_are_refused_in_words_or_are_rows(
    tmp_path: Path, lines: list[str], data_format: dict[str, Any], end: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(end.join(lines))
    prepare(tmp_path / "rows.jsonl", tmp_path / "data", data_format)


@tries(400)
@given(st.sampled_from([".jsonl", ".json", ".parquet"]), st.data())
def test_any_bytes_in_the_place_of_rows_are_refused_in_words_or_are_rows(
    tmp_path: Path, suffix: str, data: st.DataObject
) -> None:
    rows = [{"instruction": "w1 w2", "response": "w3 w4"}] * 3
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=20)) + whole[start + data.draw(st.integers(0, 30)) :])
    prepare(path, tmp_path / "data", FORMATS[0])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '[{"instruction": ' + "9" * 5000 + "}]"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_made_to_hurt_are_refused_with_the_name_of_their_file(tmp_path: Path, suffix: str, text: str) -> None:
    (tmp_path / f"rows{suffix}").write_text(text)
    with pytest.raises(ValueError, match=rf"rows\{suffix}"):
        read_file(tmp_path / f"rows{suffix}")


# ---- score stores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(scored_world(tmp_path_factory.mktemp("fuzz"), 12)[1].place)


@pytest.fixture(scope="module")
def whole_scores(store: Path) -> list[np.ndarray]:
    return all_scores(store)


def all_scores(path: Path) -> list[np.ndarray]:
    """Everything a reader reads."""
    store = ScoreStore(path)
    if store.missing_shards():
        raise ValueError("a shard is missing, and is scored again")
    scores = [store.scores_at(position) for position in range(store.rows)]
    own = [store.uncertainty_at(position) for position in range(store.rows)]
    fields = ("target_logprob", "topk_ids", "topk_logprobs", "tail_logmass")
    return [*own, *(getattr(row, name) for row in scores for name in fields)]


@tries(500)
@given(st.data())
def test_whatever_happens_to_a_byte_of_a_store_no_reader_gets_other_scores(
    store: Path, whole_scores: list[np.ndarray], data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(sorted(store.glob("*.*"))))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    harm = data.draw(st.sampled_from(["flip", "cut", "insert", "digit"]))
    if harm == "cut":
        broken = whole[:place]
    elif harm == "insert":
        broken = whole[:place] + data.draw(st.binary(min_size=1, max_size=9)) + whole[place:]
    elif harm == "digit":
        digits = [index for index, byte in enumerate(whole) if chr(byte).isdigit()]
        place = data.draw(st.sampled_from(digits))
        broken = whole[:place] + data.draw(st.sampled_from(string.digits)).encode() + whole[place + 1 :]
    else:
        broken = whole[:place] + bytes([whole[place] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[place + 1 :]
    try:
        path.write_bytes(broken)
        after = all_scores(store)
    except ValueError as error:
        assert str(error)
    else:
        assert len(whole_scores) == len(after)
        for mine, theirs in zip(whole_scores, after, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    finally:
        path.write_bytes(whole)
