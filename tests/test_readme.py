"""What the pages say: their code runs, their recipes parse, their commands, links, tables and trees are true."""

from __future__ import annotations

import inspect
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from test_layers import LAYER_OF
from training import make_trainer
from typer.main import get_command

from hfkd import DistillationTrainer, Divergence, Source, StateLoss, Teacher, TokenLoss, load_rows
from hfkd.cli.main import app
from hfkd.config import DistillationConfig
from hfkd.data.verify import as_verifier
from hfkd.labels.plan import load_plan
from hfkd.losses import LOSSES, STATE_LOSSES
from hfkd.recipe import expand, load_recipe
from hfkd.run.build import build
from hfkd.transforms import Workshop

ROOT = Path(__file__).resolve().parent.parent
RUNNABLE = ("README.md", "docs/losses.md", "docs/write_your_own.md", "docs/data.md", "docs/fidelity.md")
FOLDERS = (
    *("compress", "secokd", "accelerate", "ablation", "on_policy", "self_teacher", "several"),
    *("which_data", "which_tokens", "whose_text", "self_knowledge", "kd_rl", "lorid", "black_box"),
)
PAGES = (
    *(*RUNNABLE, "CONTRIBUTING.md", "recipes/README.md", *(f"recipes/{folder}/README.md" for folder in FOLDERS)),
    *(f"docs/{name}.md" for name in ("architecture", "teachers", "caching", "several_teachers", "cross_tokenizer")),
    *(f"docs/{name}.md" for name in ("security", "preflight", "evaluating", "publishing", "tracking", "papers")),
    *(f"docs/guides/{path.name}" for path in sorted((ROOT / "docs/guides").glob("*.md"))),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct")


class Block(NamedTuple):
    """A fenced block: the page, its first line there, its text, and the file it is meant for, if it names one."""

    page: str
    line: int
    text: str
    file: str | None


def blocks(language: str, pages: tuple[str, ...] = RUNNABLE) -> list[Block]:
    """The fenced blocks of a language, in order."""
    made = []
    for page in pages:
        text = (ROOT / page).read_text("utf-8")
        for found in FENCE.finditer(text):
            if found[1] == language:
                name = re.match(r"# (\w+\.py)\n", found[2])
                made.append(Block(page, text.count("\n", 0, found.start()) + 2, found[2], name and name[1]))
    return made


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", (ROOT / page).read_text("utf-8"))


def ids(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder as a reader's: the recipes, the files that the pages name, and tiny models under the names of
    the hub.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for seed, name in enumerate(MODELS):
        make_model(seed=seed).save_pretrained(name)
        make_tokenizer().save_pretrained(name)
    for block in blocks("python"):
        if block.file:
            Path(block.file).write_text(block.text, "utf-8")
            monkeypatch.delitem(sys.modules, Path(block.file).stem, raising=False)
    yield tmp_path
    for block in blocks("python"):
        sys.modules.pop(Path(block.file or "").stem, None)


# --- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=ids)
def test_python_blocks_run(desk, block):
    """An example that fails is worse than none: it is the first thing that a reader copies."""
    exec(compile(block.text, ids(block), "exec"), {"__name__": "__main__"})  # noqa: S102


def own_classes(module: str, kind: type) -> list[type]:
    """The classes of a kind that a file of the pages defines."""
    found = vars(__import__(module)).values()
    return [each for each in found if inspect.isclass(each) and issubclass(each, kind) and each.__module__ == module]


def test_the_losses_of_the_pages_train(desk):
    """A loss that can be imported may still not train: a wrong shape, no gradient, a parameter that never moves."""
    classes = own_classes("my_losses", TokenLoss)
    assert len(classes) == 5
    for number, cls in enumerate(classes):
        trainer = make_trainer(desk / str(number), objective=[cls()], max_steps=1)
        parameters = [*trainer.objective.parameters()]
        before = [value.detach().clone() for value in parameters]
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 1 and math.isfinite(losses[0])
        assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


@pytest.mark.parametrize("module", ["my_states", "my_growing"])
def test_the_other_losses_of_the_pages_train(desk, module):
    """A loss on states that can be imported may find other widths than it expects, or get no gradient."""
    classes = own_classes(module, StateLoss if module == "my_states" else Divergence)
    assert len(classes) == {"my_states": 2, "my_growing": 1}[module]
    for number, cls in enumerate(classes):
        for width in (32, 48):
            trainer = make_trainer(
                desk / f"{number}{width}",
                teacher=make_model(seed=1, hidden_size=width),
                objective=["forward_kl", cls()],
                max_steps=1,
            )
            before = [value.detach().clone() for value in trainer.objective.parameters()]
            trainer.train()
            (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
            assert 0 < logged[f"loss/{cls.key}"] < 100
            after = [*trainer.objective.parameters()]
            assert bool(after) == (module == "my_states" and width != 32)
            assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    if module == "my_growing":
        assert 0 < logged["loss/growing_kl/top_mass"] <= 1


@pytest.mark.parametrize(
    "module, options", [("my_teachers", {"vocab_size": 384}), ("my_snapshot", {"every": 1})], ids=["sparse", "model"]
)
def test_the_teachers_of_the_pages_teach(desk, module, options):
    """A teacher whose rows don't fit the student's is found out in the first step, not when it is imported."""
    (cls,) = own_classes(module, Teacher)
    trainer = make_trainer(desk / "run", teacher=cls(**options), max_steps=2, learning_rate=0.1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)


def test_what_decides_on_the_pages_decides(desk):
    """A sampler, a reviser and a transform that can be imported may still not fit a training."""
    import my_deciding

    rows = [{"prompt": word, "completion": word} for word in ("ccc", "a", "dddd", "bb")]
    own = {"sampler": my_deciding.ShortFirst(), "revisers": [my_deciding.WhereTheyDiffer()]}
    trainer = make_trainer(desk / "run", rows=rows, per_device_train_batch_size=4, max_steps=1, **own)
    assert list(trainer.sampler) == [1, 3, 0, 2]
    trainer.train()
    assert any("loss" in entry for entry in trainer.state.log_history)
    said = []
    rows = [{"prompt": "who is Ann"}, {"prompt": "Who is she"}]
    workshop = Workshop(None, None, builder=None, say=said.append)
    assert my_deciding.WithoutNames().apply(rows, workshop) == rows[1:] and said
    assert as_verifier(my_deciding.ends_in_a_digit)({"prompt": "2"}, "It is 4") == 1.0


def test_the_example_of_the_readme_is_short_and_teaches_itself():
    """What is advertised as twenty lines grows, and drops what it is about."""
    example = next(block.text for block in blocks("python", ("README.md",)))
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 21
    for part in ('teacher="self"', "peft_config=", "demonstrations=", "student_shots="):
        assert part in example
    own = next(block.text for block in blocks("python", ("README.md",)) if "Divergence)" in block.text)
    assert sum(bool(line.strip()) for line in own.splitlines()) < 10
    assert set(inspect.signature(DistillationTrainer).parameters) > {"demonstrations", "student_shots", "prompts"}
    assert next(iter(inspect.signature(DistillationConfig).parameters)) == "output_dir"


# --- recipes, rows, commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("yaml", PAGES), ids=ids)
def test_yaml_blocks_are_recipes(desk, block):
    """A key in a page that the schema doesn't know is an error on the reader's screen."""
    sections = yaml.safe_load(block.text)
    if "student" not in sections:  # a part of a recipe, shown by itself
        whole = yaml.safe_load(Path("recipes/secokd/past_tense.yaml").read_text("utf-8"))
        whole["data"]["train"]["path"] = str(ROOT / "recipes/secokd/data/past_tense.jsonl")
        whole["evaluation"]["forgetting"] = []
        if "reinforcement" in sections:
            whole.pop("loss")  # its term is the reverse KL by default
        sections = {key: {**whole.get(key, {}), **sections.get(key, {})} for key in {**whole, **sections}}
    Path("page.yaml").write_text(yaml.safe_dump(sections), "utf-8")
    for one in expand(load_recipe("page.yaml")).values():
        assert build(one, dry=True).objective.terms


@pytest.mark.parametrize("block", blocks("jsonl"), ids=ids)
def test_jsonl_blocks_are_rows(desk, block):
    """The shape of a row is copied from the page into a file of thousands."""
    Path("page.jsonl").write_text(block.text, "utf-8")
    assert len(load_rows(Source("page.jsonl"))) == len(block.text.splitlines())


def command_lines(page: str) -> Iterator[list[str]]:
    """The words of each line of the page's shell blocks."""
    for block in blocks("bash", (page,)):
        for line in block.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(desk, page):
    """Pages and command line change at different times; recipe, overrides and flags of a page must still be valid."""
    known = get_command(app).commands
    for words in command_lines(page):
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "hfkd":
            assert words[1] in known, f"{page}: {' '.join(words)}"
            command, arguments = words[1], words[2:]
        elif words[:2] == ["accelerate", "launch"]:
            script = next(place for place, word in enumerate(words) if word.endswith(".py"))
            assert (ROOT / words[script]).is_file()
            assert all((ROOT / word).is_file() for word in words[:script] if word.endswith(".yaml"))
            command, arguments = "train", words[script + 1 :]
        else:
            continue
        flags = {flag for option in known[command].params for flag in option.opts}
        assert {word for word in arguments if word.startswith("--")} <= flags, f"{page}: {' '.join(words)}"
        overrides = [word for word in arguments if re.match(r"[a-z_.0-9]+=", word)]
        if command == "label":
            load_plan(arguments[0], overrides)
        elif command in ("check", "train", "cache") or arguments[0].endswith((".yaml", ".json")):
            load_recipe(arguments[0], overrides)


@pytest.mark.parametrize("page", PAGES)
def test_named_commands_exist(page):
    """A command that only the page has."""
    text = (ROOT / page).read_text("utf-8")
    code = "\n".join([found[2] for found in FENCE.finditer(text)] + re.findall(r"`([^`\n]+)`", prose(page)))
    commands = set(re.findall(r"^hfkd ([a-z]\w*)", code, re.MULTILINE))
    assert commands <= set(get_command(app).commands)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) <= targets


def test_the_readme_shows_the_ways_to_run():
    """A way to run that the page no longer names is a way that nobody finds."""
    lines = [" ".join(words) for words in command_lines("README.md")]
    for start in ("make quickstart", "make test", "hfkd train", "hfkd evaluate", "accelerate launch", "pip install"):
        assert any(line.startswith(start) for line in lines), start


# --- links, tables, trees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """A link to a file that was renamed."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http:", "https:", "#")):
            assert (ROOT / page).parent.joinpath(target.partition("#")[0]).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_exist(page):
    """A promise with a test that was renamed or deleted is a promise without a test."""
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / page).read_text("utf-8")):
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), f"{page}: {file}::{name}"


def test_the_readme_stays_readable():
    """A README grows until nobody reads it."""
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 250


def test_the_families_name_every_loss_once():
    """A loss that isn't in the table is not found; one that is only in the table is looked for in vain. What is said
    of each of them is in docs/losses.md, see test_losses_page.py.
    """
    section = (ROOT / "README.md").read_text("utf-8").split("## Losses")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert all(len(cells) == 3 for cells in rows)
    named = [key for cells in rows for key in re.findall(r"`(\w+)`", cells[1])]
    assert sorted(named) == sorted([*LOSSES, *STATE_LOSSES])
    assert all(
        set(re.findall(r"`(\w+)`", cells[1])) <= set(STATE_LOSSES) for cells in rows if cells[0] == "hidden states"
    )
    assert "(docs/losses.md)" in section


def test_the_number_of_losses_is_counted():
    """A number in the comparison with other libraries that was true once."""
    count = re.search(
        r"\| losses \| (\d+) on distributions and text, (\w+) on hidden states",
        (ROOT / "README.md").read_text("utf-8"),
    )
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert (int(count[1]), words.index(count[2])) == (len(LOSSES), len(STATE_LOSSES))


def tree() -> tuple[dict[str, int], dict[str, str]]:
    """The tree of the architecture page: the layer of each path below hfkd/, and what is said of it."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8").split("```\nhfkd/\n")[1].split("\nrecipes/")[0]
    layer, folder, layers, words = -1, "", {}, {}
    for line in text.splitlines():
        found = re.match(r"(?P<indent> +)(?:(?P<layer>\d)  )?(?P<name>[\w.]+/?)(?P<words>.*)", line)
        layer = int(found["layer"]) if found["layer"] else layer
        column = found.start("name")
        if column <= 5:
            folder = found["name"] if found["name"].endswith("/") else ""
        path = found["name"] if column <= 5 else folder + found["name"]
        layers[path], words[path] = layer if column > 2 else -1, found["words"]
    return layers, words


def test_the_tree_is_the_tree():
    """A map that lacks a file, or shows one that is gone, is not looked at a second time."""
    layers, words = tree()
    for path, layer in layers.items():
        assert (ROOT / "hfkd" / path).exists(), path
        unit = path.split("/")[0].removesuffix(".py").removesuffix(".md.jinja")
        assert layer in (LAYER_OF.get(unit), -1), f"{path} is in layer {LAYER_OF.get(unit)}, the page says {layer}"
    for file in (ROOT / "hfkd").rglob("*.*"):
        path = file.relative_to(ROOT / "hfkd")
        if "__pycache__" in path.parts or path.name == "__init__.py":
            continue
        told = path.as_posix() in layers or path.stem in re.findall(r"\w+", words.get(f"{path.parent}/", ""))
        assert told, f"docs/architecture.md has no line for hfkd/{path}"
