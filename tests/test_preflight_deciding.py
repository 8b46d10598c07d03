"""What `hfkd check` says of samplers, transforms and rewards: found before a run, and nothing tried that it can't."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from deciding import lay_out
from rich.console import Console

from hfkd.preflight import check_recipe
from hfkd.preflight.findings import Finding
from hfkd.recipe import load_recipe
from hfkd.run import run_recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"verb{number}", "completion": "ed", "domain": "one"} for number in range(40)]
    lay_out(rows, demonstrations=2)
    return tmp_path


def found(*overrides: str) -> list[Finding]:
    console = Console(file=io.StringIO(), width=200)
    findings = check_recipe(load_recipe("recipe.yaml", overrides), items=2, console=console)
    return [finding for finding in findings if finding.name == "what decides"]


def test_one_domain_is_an_error_before_anything_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that can't draw must not wait for the questions, nor for the teacher's answers."""
    (finding,) = found("data.sampler={kind: domains, interval: 2}")
    assert finding.level == "error" and "one" in finding.message
    asked: list[str] = []
    monkeypatch.setattr("hfkd.run.conduct._Conductor._evaluate", lambda *_: asked.append("evaluate"))
    with pytest.raises(ValueError, match="domain"):
        recipe = load_recipe("recipe.yaml", ["data.sampler={kind: domains, interval: 2}"])
        run_recipe(recipe, console=Console(file=io.StringIO()))
    assert not asked


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.transforms=[{kind: prune, keep: 0.5, by: score}]", "None as 'score'"),
        ("data.revise=[{kind: select, per: domain}]", "only the domain 'one'"),
    ],
)
def test_columns_that_parts_go_by_are_looked_for_first(folder: Path, override: str, said: str) -> None:
    """A check that passes what the run refuses after all questions were asked has helped nobody."""
    (finding,) = found(override)
    assert finding.level == "error" and said in finding.message


def test_transforms_are_named_and_not_run(folder: Path) -> None:
    """Who reads the examples of a check must know that the run's are others."""
    (finding,) = found("data.transforms=[{kind: prune, keep: 0.5}]")
    assert finding.level == "pass" and "before prune" in finding.message


def test_a_rewarded_run_is_checked_as_far_as_it_can_be(folder: Path) -> None:
    """A check that fails on a recipe which runs is worse than none."""
    changes = ["reinforcement={verifier: exact, num_generations: 2}", "data.answer=student"]
    changes += ["data.generation.temperature=1.0"]
    (finding,) = found(*changes)
    assert finding.level == "warning" and "rewarded" in finding.message
