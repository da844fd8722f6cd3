"""What comes from others is read and not obeyed. ``docs/security.md`` names these tests, and some of other files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from actors.model_source import ModelSource
from actors.models import load_model
from orchestrator.config.load import ConfigError
from orchestrator.data.tokenizers import load_tokenizer
from orchestrator.models.models import vocab_size_of
from tests.orchestrator.config.test_run import changed
from tests.worlds import tiny_llama

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "security.md"


def test_each_test_that_the_page_names_is_there() -> None:
    names = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    everything = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 8
    assert [name for name in sorted(names) if f"def {name}(" not in everything] == []


def model_with_code(folder: Path, marker: Path) -> ModelSource:
    """A model whose configuration, tokenizer and weights ask for code of its own, which leaves a file when it is run."""
    tiny_llama(folder, seed=1)
    settings = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": ["own.OwnTokenizer", None]}
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "own", "auto_map": own}))
    words = json.loads((folder / "tokenizer_config.json").read_text()) | {"auto_map": own, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"  # its own: loading it marks the class
        f"Path({str(marker)!r}).touch()\n"
    )
    return ModelSource(str(folder))


@pytest.mark.parametrize(
    "read",
    [load_model, vocab_size_of, lambda source: load_tokenizer(source.name, source.revision, source.trust_remote_code)],
    ids=["weights", "shape", "tokenizer"],
)
def test_code_that_comes_with_a_model_is_not_run_unless_the_configuration_says_so(
    tmp_path: Path, read: Callable[[ModelSource], Any]
) -> None:
    marker = tmp_path / "ran"
    source = model_with_code(tmp_path / "model", marker)
    with pytest.raises(ValueError, match="trust_remote_code"):
        read(source)
    assert not marker.exists()


def test_the_code_that_is_not_run_would_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    source = model_with_code(tmp_path / "model", marker)
    AutoConfig.from_pretrained(source.name, trust_remote_code=True)
    assert marker.exists(), "otherwise the tests above would show nothing"


@pytest.mark.parametrize("key", ["name", "tune.name", "compare.name"])
@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/tmp/x", ".hidden", "a b", "$(id)", "a\nb", ""])
def test_a_name_cannot_lead_out_of_its_folder(key: str, name: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        changed(f"{key}={json.dumps(name)}")


@pytest.mark.parametrize("name", ["..", "a/b", ""])
def test_nor_can_that_of_a_teacher(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a folder's name"):
        changed(f"compare.teachers={json.dumps({name: {}, 'b': {}})}")
