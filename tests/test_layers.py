"""The walls of the house: imports go down only, in no circle, and no file or function outgrows its reader.

Only the standard library and pytest are needed here, so that `make check` can run this without installing torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "hfkd"

# The one table of layers. A module or a package at the top of hfkd/ stands in exactly one line.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "batch",
        "rows",
        "states",
        "support",
        "teacher_rows",
        "signal",
        "distributed",
        "sharding",
        "zero",
        "memory",
        "packing",
        "prefix",
        "loading",
        "errors",
        "schedules",
        "named",
        "masking",
        "uploads",
        "files",
        "intervals",
    ),
    ("losses", "terms", "plan", "chunks", "objective", "data", "cache", "privacy"),
    ("teachers", "rollout"),
    (
        "metrics",
        "record",
        "config",
        "student",
        "narrowing",
        "checkpoint",
        "callbacks",
        "compatibility",
        "writing",
        "examples",
        "gradients",
        "preemption",
        "faults",
        "long_runs",
        "publishing",
        "trainer",
        "origins",
        "energy",
        *("measures", "token_figures", "reading"),
        *("sampling", "revision", "transforms"),
    ),
    ("eval", "report", "card", "hub", "reinforcement", "adapters"),
    (
        *("recipe", "run", "preflight", "labels"),
        *("cli", "__main__"),
    ),
)
LAYER_OF = {unit: layer for layer, units in enumerate(LAYERS) for unit in units}

# What the package needs to run must not lie in folders that a wheel does not hold.
NEVER_IMPORTED = ("tests", "recipes", "scripts", "docs", "model_cards", "conftest")

# What `from hfkd import ...` may name below the top: the version, and nothing that would pull the whole package in.
ROOT_NAMES = ("__version__",)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def module_name(path: Path, root: Path) -> str:
    """hfkd/data/load.py -> hfkd.data.load; hfkd/data/__init__.py -> hfkd.data."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_modules(root: Path) -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the package by its dotted name: its path below the root, and its parse."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    return {
        module_name(path, root): (path.relative_to(root), ast.parse(path.read_text("utf-8"), str(path)))
        for path in paths
    }


def import_targets(name: str, path: Path, tree: ast.Module) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Line, absolute module and names of each import, wherever it stands: in functions and TYPE_CHECKING too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield node.lineno, module, tuple(alias.name for alias in node.names)


def edges(modules: dict[str, tuple[Path, ast.Module]]) -> Iterator[tuple[str, int, str]]:
    """Importing module, line, imported module; `from package import submodule` is an import of the submodule."""
    for name, (path, tree) in modules.items():
        for line, module, names in import_targets(name, path, tree):
            if module.split(".")[0] != PACKAGE:
                yield name, line, module
                continue
            submodules = [f"{module}.{each}" for each in names if f"{module}.{each}" in modules]
            yield from ((name, line, submodule) for submodule in submodules)
            rest = [each for each in names if f"{module}.{each}" not in modules]
            if module == PACKAGE and all(each in ROOT_NAMES for each in rest):
                continue
            if rest or not names:
                yield name, line, module


def unit_of(module: str) -> str:
    """The part of a dotted name that stands in the table: hfkd.data.load -> data; hfkd itself -> an empty name."""
    return module.split(".")[1] if "." in module else ""


def unknown_units(modules: dict[str, tuple[Path, ast.Module]]) -> list[str]:
    """Complaints about modules that the table does not have."""
    units = sorted({unit_of(name) for name in modules} - {"", *LAYER_OF})
    return [
        f"{PACKAGE}/{unit} is in no layer: add {unit!r} to LAYERS in tests/test_layers.py, in the line of the highest "
        f"layer that it imports or a later one, and to the tree in docs/architecture.md"
        for unit in units
    ]


def upward_imports(modules: dict[str, tuple[Path, ast.Module]]) -> list[str]:
    """Complaints about imports that go up, or out to folders that are not installed."""
    found = []
    for name, line, target in edges(modules):
        where = f"{modules[name][0].as_posix()}:{line}"
        if target.split(".")[0] in NEVER_IMPORTED:
            found.append(f"{where} imports {target}, which is not part of the installed package")
        if target.split(".")[0] != PACKAGE or not unit_of(name):
            continue
        if not unit_of(target):
            found.append(
                f"{where} imports from {PACKAGE} itself, which pulls everything in: name the module that has it"
            )
        elif LAYER_OF.get(unit_of(target), -1) > LAYER_OF.get(unit_of(name), len(LAYERS)):
            found.append(
                f"{where} (layer {LAYER_OF[unit_of(name)]}) imports {target} (layer {LAYER_OF[unit_of(target)]}): "
                f"imports only go down. Move what is shared to the lower layer, or pass it in as an argument"
            )
    return found


def circles(modules: dict[str, tuple[Path, ast.Module]]) -> list[str]:
    """Complaints about circles: among files, and among the modules and packages at the top of hfkd/."""
    files: dict[str, set[str]] = {}
    units: dict[str, set[str]] = {}
    for name, _, target in edges(modules):
        if target.split(".")[0] != PACKAGE or PACKAGE in (name, target):
            continue
        if name != target:
            files.setdefault(name, set()).add(target)
        if unit_of(name) != unit_of(target):
            units.setdefault(unit_of(name), set()).add(unit_of(target))
    found = []
    for graph in (files, units):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append("imports go in a circle: " + " <- ".join(error.args[1]))
    return found


def too_long(path: Path, text: str) -> list[str]:
    """Complaints about the length of a file and of its functions (signature and docstring included)."""
    lines = text.count("\n")
    found = [f"{path}: {lines} lines, at most {MAX_FILE_LINES}: split it by subject"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno} {node.name}: {length} lines, at most {MAX_FUNCTION_LINES}")
    return found


@pytest.fixture(scope="module")
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """The real package."""
    found = read_modules(ROOT)
    assert len(found) > 1, f"no modules under {ROOT / PACKAGE}: the checks below would pass on nothing"
    return found


def test_every_module_has_a_layer(modules):
    """A module that nobody placed would escape every other check of this file."""
    assert not (complaints := unknown_units(modules)), "\n".join(complaints)


def test_imports_go_down_only(modules):
    """A loss that knows a teacher, or data that know a model, can no longer be used or tested by itself."""
    assert not (complaints := upward_imports(modules)), "\n".join(complaints)


def test_no_import_circles(modules):
    """A circle works or fails depending on which module a user imports first."""
    assert not (complaints := circles(modules)), "\n".join(complaints)


def test_files_and_functions_stay_readable():
    """Files and functions grow by one reasonable line at a time, until nobody can review them."""
    paths = [path for folder in (PACKAGE, "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
    complaints = [each for path in paths for each in too_long(path.relative_to(ROOT), path.read_text("utf-8"))]
    assert not complaints, "\n".join(complaints)


def write_package(root: Path, **files: str) -> dict[str, tuple[Path, ast.Module]]:
    """A made-up package: keys are paths with `__` for `/`."""
    for key, text in {"init": "", **files}.items():
        name = "__init__" if key == "init" else key.replace("__", "/")
        path = root / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_modules(root)


@pytest.mark.parametrize(
    ("importer", "text", "complaint"),
    [
        ("batch", "from hfkd.trainer import Trainer\n", "hfkd/batch.py:1 (layer 0) imports hfkd.trainer (layer 3)"),
        ("batch", "from . import trainer\n", "imports hfkd.trainer"),
        ("batch", "def late():\n    import hfkd.trainer\n", "hfkd/batch.py:2"),
        ("batch", "if TYPE_CHECKING:\n    from .trainer import Trainer\n", "hfkd/batch.py:2"),
        (
            "losses__kl",
            "from ..teachers.base import Teacher\n",
            "hfkd/losses/kl.py:1 (layer 1) imports hfkd.teachers.base",
        ),
        ("batch", "from hfkd import Batch\n", "imports from hfkd itself"),
        ("card", "from tests.conftest import make_model\n", "not part of the installed package"),
        ("init", "import scripts.distill\n", "not part of the installed package"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, importer, text, complaint):
    """A layer test that finds nothing because it reads imports wrongly is worse than none."""
    made = write_package(tmp_path, **{"trainer": "", "teachers__base": "", "card": "", importer: text})
    assert any(complaint in each for each in upward_imports(made)), upward_imports(made)


@pytest.mark.parametrize(
    ("importer", "text"),
    [
        ("init", "from hfkd.cli.main import app\n"),
        ("record", "from hfkd import __version__\n"),
        ("trainer", "from hfkd import batch\nfrom .config import DistillationConfig\nimport torch, json\n"),
        ("losses__kl", "from .base import Divergence\n"),
    ],
)
def test_a_right_import_passes(tmp_path, importer, text):
    """A layer test that refuses ordinary imports teaches people to switch it off."""
    others = {"batch": "", "config": "", "cli__main": "", "losses__base": "", "record": ""}
    assert not upward_imports(write_package(tmp_path, **{**others, importer: text}))


def test_circles_are_found(tmp_path):
    """Two files that import each other, and two packages that do so through different files, are both circles."""
    files = write_package(tmp_path / "files", config="import hfkd.trainer\n", trainer="from .config import X\n")
    assert len(circles(files)) == 2
    packages = {"data__load": "import hfkd.losses.kl", "losses__base": "import hfkd.data.views"}
    made = write_package(tmp_path / "packages", **packages, data__views="", losses__kl="")
    assert len(circles(made)) == 1
    straight = write_package(tmp_path / "straight", trainer="from .config import X\n", config="")
    assert not circles(straight)


def test_a_new_module_is_told_where_to_go(tmp_path):
    """Whoever adds a module should learn about the table from the failure, not from a search."""
    (complaint,) = unknown_units(write_package(tmp_path, newcomer=""))
    assert "'newcomer'" in complaint and "LAYERS in tests/test_layers.py" in complaint


def test_lengths_are_measured():
    """The limits hold for the sum of what a reader must hold in mind, docstring included."""
    text = "def long():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert len(too_long(Path("one.py"), text)) == 1
    assert len(too_long(Path("two.py"), "x = 1\n" * (MAX_FILE_LINES + 1))) == 1
    assert not too_long(Path("three.py"), text.replace("    x = 1\n", "", 1))


def test_no_two_test_files_share_a_name():
    """pytest puts their folders on one path: the second of a name is never imported, and its tests read the first."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")]
    assert sorted(names) == sorted(set(names))
