"""From a YAML file and dotted overrides to a RunConfig, or to an error that names the key. Imports neither torch nor Ray."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from actors.config.places import in_object_storage, resolved
from actors.storage.mirror import Mirror, folder_on_nodes
from losses.section import sections_of
from orchestrator.config.run import RunConfig

PATHS = ("output", "root", "path", "name", "folder")
"""Names of keys that hold a path, or may."""

RENAMED = {"loss.teaching": "loss.kind", "teacher.fit": "teacher.finetune", "student.fit": "student.finetune"}
"""Keys of earlier versions, and what they are called now."""


class ConfigError(ValueError):
    """The configuration asks for something that cannot be; the message says which key and what would do."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply overrides such as ``loss.easy_ratio=0.3`` and validate.

    Raises:
        ConfigError: naming the file or key, the value seen and, where there is one, the nearest right key.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise ConfigError(f"no configuration file at {file}; {_nearby_configs(file)}")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{file}: byte {error.start}, {byte:#04x}, is no UTF-8; save the file as UTF-8") from None
    tree = parse_yaml(text, str(file))
    for override in overrides:
        apply_override(tree, override)
    config = validate(tree)
    _require_homes(config.model_dump())
    return config


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Path]:
    """Read the configuration of a run that is named by its YAML file or by its folder; return it, and the folder.

    A folder may have been moved since: what is in it counts, whatever its configuration says of ``output`` and ``name``. One in
    object storage is copied to this node, and the copy is read.

    Raises:
        ConfigError: as ``load_config`` does, or if the folder is no run's.
    """
    folder = Path(path)
    if in_object_storage(path):
        address = resolved(str(path))
        folder = folder_on_nodes(address)
        Mirror(str(folder), address).sync()
    if not folder.is_dir():
        config = load_config(folder, overrides)
        return config, config.run_dir
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"the folder {path} holds no config.yaml, so no run has made it; a run's own folder, such as runs/tiny_cpu, or its "
            "YAML file would do"
        )
    return load_config(folder / "config.yaml", overrides), folder.resolve()


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds; ``origin`` names it in errors."""
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except RecursionError:
        raise ConfigError(f"{origin} is not YAML that can be read: it is nested too deeply, or holds itself") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for numbers of thousands of digits, and dates that are none
        raise ConfigError(f"{origin} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{origin} must hold a mapping of sections such as data, teacher and student; it holds {type(tree).__name__}"
        )
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b.c=value`` in the tree; the value is read as YAML, so numbers, lists and null work.

    A number in the place of a section is the place of a list's item, counted from 0: ``data.sources.0.weight=2``.
    """
    key, equals, text = override.partition("=")
    if not equals or not key or "" in key.split("."):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, such as loss.easy_ratio=0.3")
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {override!r}: the value {text!r} is not YAML; quote it if it is a text") from None
    *sections, name = key.split(".")
    within: Any = tree
    for section in sections:
        step = _step(within, section, override)
        if isinstance(within, dict):
            within.setdefault(step, {})
        if not isinstance(within[step], dict | list):
            within[step] = {}
        within = within[step]
    within[_step(within, name, override)] = value


def _step(within: dict[str, Any] | list[Any], step: str, override: str) -> Any:
    """Return the key of a section, or the index of a list's item, that a step of an override names."""
    if not isinstance(within, list):
        return step
    if step.isdecimal() and int(step) < len(within):
        return int(step)
    raise ConfigError(f"override {override!r}: {step!r} is none of a list's {len(within)} items, which are counted from 0")


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """Return the typed configuration, or raise a ConfigError with a line for each fault."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(fault, tree) for fault in error.errors()]
        raise ConfigError("the configuration cannot be used:\n  " + "\n  ".join(dict.fromkeys(lines))) from None


def dump_config(config: RunConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that ``load_config`` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "", sides: tuple[str, str] = ("here", "there")
) -> list[str]:
    """Return a line for each key in which two dumped configurations differ; ``sides`` are their names."""
    lines = []
    for key in dict.fromkeys([*ours, *theirs]):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            lines += config_difference(mine, other, f"{prefix}{key}.", sides)
        elif mine != other:
            lines.append(f"{prefix}{key}: {mine!r} {sides[0]}, {other!r} {sides[1]}")
    return lines


def _explain(fault: ErrorDetails, tree: Mapping[str, Any]) -> str:
    steps = _plain_steps(fault["loc"], tree, ends_in_key=fault["type"] != "value_error")
    place = ".".join(str(step) for step in steps) or "the whole"
    if fault["type"] == "extra_forbidden":
        return f"{place}: {_no_such_key(fault['loc'], place)}"
    if fault["type"] == "missing":
        return f"{place}: is missing"
    if fault["type"] == "union_tag_not_found":
        for key in fault["input"]:
            if f"{place}.{key}" in RENAMED:
                return f"{place}.{key}: is now {RENAMED[f'{place}.{key}']}"
        return f"{place}: needs {fault['ctx']['discriminator']}, which says what it is; got {fault['input']!r}"
    if fault["type"] == "union_tag_invalid":
        key, tags = fault["ctx"]["discriminator"].strip("'"), fault["ctx"]["expected_tags"]
        return f"{place}.{key}: {no_such_name(fault['ctx']['tag'], _quoted_names(tags))}"
    if fault["type"] == "literal_error":
        return f"{place}: {no_such_name(fault['input'], _quoted_names(fault['ctx']['expected']))}"
    if fault["type"] in ("model_type", "model_attributes_type"):
        fields = _sections_at(fault["loc"])[0].model_fields
        first = next((name for name, field in fields.items() if field.is_required()), next(iter(fields)))
        return f"{place}: is a section of keys, such as {place}.{first}; got {fault['input']!r}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{place}: {message}" if steps else message
    return f"{place}: {message}; got {fault['input']!r}"


def no_such_name(wrong: Any, known: Sequence[str]) -> str:
    """Return an error text for an unknown name: the nearest known one, and all that there are."""
    close = difflib.get_close_matches(str(wrong).lower(), known, n=1, cutoff=0.5)
    return f"there is no {wrong!r}; {f'did you mean {close[0]}? ' if close else ''}there are {', '.join(known)}"


def _quoted_names(text: str) -> list[str]:
    """The names in a list of pydantic's, such as ``'vllm' or 'transformers'``."""
    return re.findall(r"'([^']*)'", text)


def _require_homes(section: Mapping[Any, Any], prefix: str = "") -> None:
    """Raise if a path begins with ~ and the user has no home folder."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            _require_homes(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            _require_homes(dict(enumerate(value)), f"{prefix}{name}.")
        elif name in PATHS and isinstance(value, str) and value.startswith("~"):
            try:
                Path(value).expanduser()
            except RuntimeError:
                raise ConfigError(
                    f"{prefix}{name} {value!r}: there is no such home folder; a whole path, beginning with /, would do"
                ) from None


def _plain_steps(location: Sequence[int | str], tree: Any, ends_in_key: bool) -> list[int | str]:
    """Drop the tags of unions that pydantic adds to an error's location: they are no keys of the file.

    A location ends in a key, perhaps an unknown one, unless a whole variant was refused: then it ends in its tag.
    """
    steps: list[int | str] = []
    for index, step in enumerate(location):
        if isinstance(tree, Mapping):
            may_be_tag = index + 1 < len(location) or not ends_in_key
            is_tag = may_be_tag and step not in tree and step in tree.values()
            if is_tag:
                continue
            tree = tree.get(step)
        elif isinstance(tree, list) and isinstance(step, int) and step < len(tree):
            tree = tree[step]
        steps.append(step)
    return steps


def _no_such_key(location: Sequence[int | str], place: str) -> str:
    if place in RENAMED:
        return f"is now {RENAMED[place]}"
    everywhere = list(_all_keys(RunConfig))
    if place in everywhere and "." in str(location[-1]):
        section, _, key = place.rpartition(".")
        return f"stands with its dots in the file, where sections stand within each other; {section}: {{{key}: ...}} would do"
    if place in everywhere:
        return f"does not go with {location[-2]}; leave it out, or choose the variant that has it"
    wrong = str(location[-1])
    known = sorted({name for section in _sections_at(location[:-1]) for name in section.model_fields})
    if close := difflib.get_close_matches(wrong, known, n=1, cutoff=0.5):
        return f"there is no such key; did you mean {close[0]}?"
    namesakes = [key for key in everywhere if key.split(".")[-1] == wrong]
    if nearest := difflib.get_close_matches(place, namesakes, n=1, cutoff=0):
        return f"there is no such key; there is {nearest[0]}"
    return f"there is no such key; there are {', '.join(known)}"


def _sections_at(location: Sequence[int | str]) -> list[type[BaseModel]]:
    """The classes that may stand at a location; a step that names no field is the tag of a union and picks its variant."""
    sections: list[type[BaseModel]] = [RunConfig]
    for step in location:
        if isinstance(step, int):
            continue  # an item of a list, whose class stands for each
        fields = [section.model_fields[str(step)] for section in sections if step in section.model_fields]
        if fields:
            sections = [found for field in fields for found in sections_of(field.annotation)]
        else:
            sections = [one for one in sections if any(step in get_args(f.annotation) for f in one.model_fields.values())]
    return sections


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in sections_of(field.annotation):
            yield from _all_keys(section, f"{prefix}{name}.")


def _nearby_configs(file: Path) -> str:
    known = sorted(path.as_posix() for path in Path("configs").glob("*.yaml"))
    close = difflib.get_close_matches(file.as_posix(), known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known) or 'none in configs/'}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key that stands twice is an error; YAML's own loader would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
