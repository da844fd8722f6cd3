"""Keys given on the command line, and those that the page on rows shows."""

import re
from pathlib import Path

import pytest
import yaml

from orchestrator.config.load import ConfigError, apply_override, validate
from tests.orchestrator.config.test_run import SMALL, changed


@pytest.mark.parametrize("override", ["foo", "=1", ".a=1", "a..b=1"])
def test_an_override_needs_a_key_and_a_value(override: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form section.key=value"):
        apply_override({}, override)


def test_an_override_reaches_into_a_list() -> None:
    two = "data.sources=[{source: {kind: builtin}, weight: 1}, {source: {kind: files, path: a.jsonl}, weight: 1}]"
    sources = changed(two, "data.sources.1.weight=3", "data.sources.1.source.path=b.jsonl").data.sources
    assert sources is not None and [share.weight for share in sources] == [1, 3]
    assert sources[1].source.path == "b.jsonl"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"override 'data\.sources\.2\.weight=3': '2' is none of a list's 2 items, which are"):
        changed(two, "data.sources.2.weight=3")
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.wieght: there is no such key; did you mean weight\?"):
        changed(two, "data.sources.1.wieght=3")
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.source\.kind: there is no 'file'; did you mean files\?"):
        changed(two, "data.sources.0.source={kind: file}")


def test_the_sources_and_formats_of_the_docs_are_configurations() -> None:
    blocks = re.findall(r"^```yaml\n(data:.*?)^```", Path("docs/data.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        validate(SMALL | yaml.safe_load(block))


def test_an_override_that_is_no_yaml_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the value '\[1' is not YAML; quote it"):
        apply_override({}, "a.b=[1")


def test_a_key_that_is_written_with_its_dots_is_named_with_the_sections_that_would_do() -> None:
    tree = yaml.safe_load(Path("configs/tiny_cpu.yaml").read_text()) | {"loss.easy_ratio": 0.3}
    with pytest.raises(ConfigError, match=r"loss\.easy_ratio: stands with its dots in the file, .*; loss: .* would do"):
        validate(tree)
