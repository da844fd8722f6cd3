"""The plan of the house, held by reading the source: who may import whom, how long a file may be, what must be explained."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("orchestrator", "actors", "losses", "tune_spaces")
MAY_IMPORT = {"orchestrator": {"actors", "losses", "tune_spaces"}, "actors": {"losses"}, "losses": set(), "tune_spaces": set()}
NEVER_IMPORTED = {"tests", "benchmarks", "scripts"}
LOSSES_MAY_IMPORT = {"torch", "pydantic", "losses"} | sys.stdlib_module_names
FILES_OF = {
    "vllm": {
        "actors/engines/vllm.py", "actors/engines/vllm_patches.py", "actors/rollouts/vllm_sampler.py",
        "actors/evaluation/harness_vllm.py",
    },
    "peft": {"actors/lora.py"},
    "wandb": {"actors/monitors/wandb.py"},
    "mlflow": {"actors/monitors/mlflow.py"},
    "openai": {"orchestrator/judging/client.py"},
    "lm_eval": {"actors/evaluation/harness.py", "actors/evaluation/harness_tasks.py", "actors/evaluation/harness_vllm.py"},
    "onnxruntime": {"orchestrator/classification/onnx_model.py"},
    "pyarrow.fs": {"actors/storage/clouds.py"},
    "azure": {"actors/storage/clouds.py"},
}
INSTANT_MODULES = (
    "losses.config", "actors.config.models", "orchestrator.config.run", "orchestrator.config.load", "orchestrator.cli",
)  # fmt: skip
PACKAGES = (
    "orchestrator", "orchestrator.reports", "orchestrator.doctor", "orchestrator.planning", "orchestrator.search",
    "orchestrator.predicting",
    "orchestrator.run", "orchestrator.classification", "orchestrator.judging", "orchestrator.models", "orchestrator.data",
    "orchestrator.cluster", "orchestrator.config",
    "actors.student", "actors.rollouts", "actors.teacher", "actors.evaluation", "actors.monitors", "actors.engines",
    "actors.dataloader", "actors.score_store", "actors.model_cache", "actors.storage", "actors", "actors.networks",
    "actors.config",
    "losses", "tune_spaces",
)  # fmt: skip
"""From the top down: a file imports from its own package and from those below it. A room's own files stand beside its folders."""
REACHES_INSIDE = {"actors/engines/vllm_patches.py"}
"""Files that reach for private names of another library, which they look up by their text and may not find."""
MOST_FILES = {"losses": 16}
"""Modules of a folder at most; 15 of any other."""
HEAVY = {"torch", "ray", "transformers", "vllm", "numpy", "datasets", "pyarrow"}
LONGEST_FILE_LINES = 320
TORCH_EXPLAINS = {"forward", "backward"}

SOURCES = sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py"))


@cache
def tree_of(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(), source)


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Yield each thing a file imports, wherever it does so, as a full dotted name: ``from a.b import c`` is ``a.b.c``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top(name: str) -> str:
    return name.split(".")[0]


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def foreign_modules_of(tree: ast.Module) -> set[str]:
    """The names under which a file knows other libraries' modules or things; the standard library is not meant."""
    own = {*ROOMS, *sys.stdlib_module_names}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or top(alias.name) for alias in node.names if top(alias.name) not in own}
        elif isinstance(node, ast.ImportFrom) and top(node.module or "") not in own:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def private_attributes_of(tree: ast.Module) -> Iterator[str]:
    """Yield each ``library._thing`` that is read off an imported name."""
    foreign = foreign_modules_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in foreign:
                yield ast.unparse(node)


def private_texts_of(tree: ast.Module) -> Iterator[str]:
    """Yield each private name that is looked up, set or asked for by its text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr"):
            yield from (part.value for part in node.args if isinstance(part, ast.Constant) and is_private(str(part.value)))


def public_definitions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yield the public functions and classes of a file, and the public methods of those classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and not member.name.startswith("_"):
                        yield member


def own_names_of(tree: ast.Module) -> set[str]:
    """The names that a file defines itself or imports from a room of ours."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and top(node.module or "") in ROOMS:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def decorators_of(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from node.decorator_list


def root_name(decorator: ast.expr) -> str:
    while isinstance(decorator, ast.Call | ast.Attribute):
        decorator = decorator.func if isinstance(decorator, ast.Call) else decorator.value
    return decorator.id if isinstance(decorator, ast.Name) else ""


def test_every_room_has_source() -> None:
    assert {top(source.replace("/", ".")) for source in SOURCES} == set(ROOMS)


@pytest.mark.parametrize("source", SOURCES)
def test_imports_go_down_only(source: str) -> None:
    room = source.split("/")[0]
    used = {top(name) for name in imports_of(tree_of(source))}
    assert used & set(ROOMS) <= MAY_IMPORT[room] | {room}
    assert not used & NEVER_IMPORTED


def package_of(module: str) -> str:
    """Return the package of a module, or of a name within it."""
    return max((package for package in PACKAGES if f"{module}.".startswith(f"{package}.")), key=len)


def module_of(source: str) -> str:
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def ours(source: str) -> set[str]:
    """The modules of ours that a file imports, anywhere in it; a package's name alone is its version."""
    modules = {module_of(one) for one in SOURCES}
    named = {name for name in imports_of(tree_of(source)) if top(name) in ROOMS}
    found = {name if name in modules else name.rpartition(".")[0] for name in named}
    return found - {module_of(source), *ROOMS}


def upward_imports(source: str) -> list[str]:
    place = PACKAGES.index(package_of(module_of(source)))
    return sorted(module for module in ours(source) if PACKAGES.index(package_of(module)) < place)


@pytest.mark.parametrize("source", SOURCES)
def test_imports_run_down_the_list_of_packages(source: str) -> None:
    assert upward_imports(source) == []


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules from which imports lead back to themselves."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        left = list(graph[start])
        while left:
            if (one := left.pop()) not in found:
                found.add(one)
                left += graph.get(one, ())
        return found

    return sorted(module for module in graph if module in reached(module))


def test_no_imports_run_in_a_circle() -> None:
    assert circles({module_of(source): ours(source) for source in SOURCES}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_a_planted_upward_import_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = ast.parse("from orchestrator.run.pipeline import run\nfrom orchestrator import __version__\n")
    monkeypatch.setattr(sys.modules[__name__], "tree_of", lambda source: planted)
    assert upward_imports("orchestrator/data/sources.py") == ["orchestrator.run.pipeline"]
    assert upward_imports("orchestrator/doctor/doctor.py") == []


def test_every_package_is_small_and_says_what_lives_there() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders} == set(PACKAGES)
    for folder in folders:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_FILES.get(folder.name, 15), folder
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert docstring and "\n" not in docstring, folder


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith("losses/")])
def test_losses_import_torch_and_pydantic_only(source: str) -> None:
    assert {top(name) for name in imports_of(tree_of(source))} <= LOSSES_MAY_IMPORT


@pytest.mark.parametrize(("library", "files"), FILES_OF.items())
def test_a_library_with_files_of_its_own_is_imported_nowhere_else(library: str, files: set[str]) -> None:
    known = {source for source in SOURCES if any(f"{name}.".startswith(f"{library}.") for name in imports_of(tree_of(source)))}
    assert known == files


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_private_is_used(source: str) -> None:
    tree = tree_of(source)
    assert [name for name in imports_of(tree) if is_private(name) or "._internal." in f".{name}."] == []
    assert list(private_attributes_of(tree)) == []
    assert bool(list(private_texts_of(tree))) == (source in REACHES_INSIDE)


def test_the_reader_of_private_names_sees_them() -> None:
    tree = ast.parse("import ray\nfrom vllm import engine as e\nray._private.x()\ne.Processor._step\nself._own\n")
    assert set(private_attributes_of(tree)) == {"ray._private", "e.Processor._step"}
    assert list(private_texts_of(ast.parse("getattr(runner, '_step', None)\ngetattr(runner, 'step')"))) == ["_step"]
    assert is_private("ray._private.worker") and is_private("vllm.engine._Core") and not is_private("a.__version__")


@pytest.mark.parametrize("source", SOURCES)
def test_no_file_is_too_long(source: str) -> None:
    assert len((ROOT / source).read_text().splitlines()) <= LONGEST_FILE_LINES


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_public_is_explained(source: str) -> None:
    tree = tree_of(source)
    assert ast.get_docstring(tree), "the file has no docstring"
    unexplained = [node.name for node in public_definitions_of(tree) if not ast.get_docstring(node)]
    assert [name for name in unexplained if name not in TORCH_EXPLAINS] == []


@pytest.mark.parametrize("source", SOURCES)
def test_decorators_are_none_of_ours(source: str) -> None:
    tree = tree_of(source)
    properties = {"setter", "getter", "deleter"}
    ours = [
        ast.unparse(decorator)
        for decorator in decorators_of(tree)
        if root_name(decorator) in own_names_of(tree) and getattr(decorator, "attr", "") not in properties
    ]
    assert ours == [], "names that a user may type stand in an explicit table"


@pytest.mark.parametrize("module", INSTANT_MODULES)
def test_configuration_imports_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print(*(name for name in sys.modules if '.' not in name))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert "pydantic" in loaded or module == "orchestrator.cli"
    assert not HEAVY & set(loaded)


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "orchestrator", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = {top(line.rsplit("|", 1)[-1].strip()) for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "usage: atkd" in done.stdout
    assert "argparse" in loaded
    assert not HEAVY & loaded
