"""Write the tables of the docs that follow from the code, between their markers.

    python -m scripts.doc_tables [--check]

With --check nothing is written, and the exit code is 1 if a page would change.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from actors.config.benchmarks import BenchmarksConfig
from actors.config.judge import JudgeConfig
from actors.config.model_kinds import CutModel
from actors.config.networks import Network, SoftLabels
from actors.config.rollouts import AdaptiveShareConfig, ReplayConfig, ResponsesConfig, RolloutsConfig
from losses.section import MayChange, NotSearchable, Searchable, Section, marked
from orchestrator.config.data import SourceShare
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from scripts.gpu_steps import steps

ROOT = Path(__file__).parents[1]


def may_change() -> list[str]:
    """Keys that may change between two starts, by the sections they stand in; sections with the same keys share a row."""
    by_section: dict[str, list[str]] = {}
    for path, _ in marked(RunConfig, MayChange):
        section, _, key = path.rpartition(".")
        by_section.setdefault(section, []).append(key)
    sections: dict[tuple[str, ...], list[str]] = {}
    for section, keys in sorted(by_section.items(), key=lambda item: (item[0].count("."), item[0])):
        sections.setdefault(tuple(keys), []).append(section)
    rows = [f"| {_names(under) if under != [''] else 'the whole'} | {_names(keys)} |" for keys, under in sections.items()]
    return ["| under | may change |", "|---|---|", *rows]


def searchable() -> list[str]:
    """Keys and sections that may differ between trials, and in what bounds."""
    rows = [f"| `{path}` | {mark.limit or 'all in it'} |" for path, mark in marked(RunConfig, Searchable)]
    return ["| may vary | |", "|---|---|", *rows]


def not_searchable() -> list[str]:
    """Sections that are the same in all trials, and why."""
    rows = [f"| `{path}` | {mark.reason} |" for path, mark in marked(RunConfig, NotSearchable)]
    return ["| the same in all trials | since |", "|---|---|", *rows]


def gpu_steps() -> list[str]:
    """The steps of ``make gpu``, and how long each takes at most."""
    rows = [
        f"| {step.name} | {step.about} | {step.limit_seconds / 60:g} | {step.needs_gpus} |"
        for step in steps(8, "runs/gpu", "MODEL", "TEACHER")
    ]
    return ["| step | what it shows | minutes at most | GPUs |", "|---|---|---:|---:|", *rows]


def keys_of(section: type[Section], under: str = "") -> list[str]:
    """Keys of a section and of those in it that are always there, their defaults, and what they mean."""
    rows = []
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            rows += keys_of(type(field.default), f"{under}{name}.")[2:]
            continue
        default = "" if field.default is PydanticUndefined else f"`{_as_yaml(field.default)}`"
        meaning = " ".join((field.description or "").split()).replace("``", "`")
        rows.append(f"| `{under}{name}` | {default} | {meaning} |")
    return ["| key | default | meaning |", "|---|---|---|", *rows]


def networks() -> list[str]:
    """Small classifiers by their kinds, each with its keys below it."""
    rows = []
    for network in get_args(Network):
        (kind,) = get_args(network.model_fields["kind"].annotation)
        rows.append(f"| `{kind}` | | | {' '.join((network.__doc__ or '').split())} |")
        rows += [f"| {row}" for row in keys_of(network)[2:] if not row.startswith("| `kind`")]
    return ["| kind | key | default | meaning |", "|---|---|---|---|", *rows]


TABLES: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "may_change": ("docs/cluster.md", may_change),
    "searchable": ("docs/search.md", searchable),
    "not_searchable": ("docs/search.md", not_searchable),
    "gpu_steps": ("docs/gpu.md", gpu_steps),
    "sources": ("docs/data.md", partial(keys_of, SourceShare)),
    "cut": ("docs/data.md", partial(keys_of, CutModel)),
    "responses": ("docs/on_policy.md", partial(keys_of, ResponsesConfig)),
    "rollouts": ("docs/on_policy.md", partial(keys_of, RolloutsConfig)),
    "adaptive_share": ("docs/on_policy.md", partial(keys_of, AdaptiveShareConfig)),
    "benchmarks": ("docs/evaluation.md", partial(keys_of, BenchmarksConfig)),
    "judge": ("docs/evaluation.md", partial(keys_of, JudgeConfig)),
    "replay": ("docs/on_policy.md", partial(keys_of, ReplayConfig)),
    "classification": ("docs/classification.md", partial(keys_of, ClassificationTask)),
    "networks": ("docs/classification.md", networks),
    "soft_labels": ("docs/classification.md", partial(keys_of, SoftLabels)),
}
"""For each marker, its page and the lines between ``<!-- table: NAME -->`` and ``<!-- end -->``."""


def with_tables(page: str, text: str) -> str:
    """Return the text of a page with its tables as they are to be."""
    for name, (of_page, lines) in TABLES.items():
        if of_page == page:
            before, after = re.split(rf"(?<=<!-- table: {name} -->\n).*?(?=<!-- end -->)", text, flags=re.DOTALL)
            text = before + "".join(f"{line}\n" for line in lines()) + after
    return text


def main(check: bool) -> int:
    """Write the tables, or look whether they are as they are to be."""
    stale = []
    for page in sorted({page for page, _ in TABLES.values()}):
        text = (ROOT / page).read_text()
        if (new := with_tables(page, text)) != text:
            stale.append(page)
            if not check:
                (ROOT / page).write_text(new)
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


def _as_yaml(default: Any) -> str:
    if default is None:
        return "null"
    return str(list(default) if isinstance(default, tuple) else default)


def _names(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
