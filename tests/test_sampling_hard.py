"""The hard-prompt sampler: what it ranks, how often it draws what is hard, and that a resumed run draws the same."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from training import ROWS, make_trainer, trained_weights

from hfkd import DistillationTrainer, LocalTeacher, PromptStyle
from hfkd.data.prompts import PromptBuilder
from hfkd.data.views import DistillationDataset
from hfkd.recipe import RecipeError, load_recipe
from hfkd.sampling.hard import HardPromptSampler

RECIPE = Path(__file__).parents[1] / "recipes" / "which_data" / "hard_prompts.yaml"


def attached(count: int, **options: Any) -> HardPromptSampler:
    rows = [{"prompt": f"p{number}", "completion": "x"} for number in range(count)]
    sampler = HardPromptSampler(**options)
    builder = PromptBuilder(make_tokenizer(), PromptStyle())
    sampler.attach(DistillationDataset(rows, builder), seed=3, examples_per_step=4)
    return sampler


def trainer_of(folder: Path, sampler: HardPromptSampler | None = None, **options: Any) -> DistillationTrainer:
    """A student beside a fixed teacher, four rows a step, four steps an epoch."""
    settings = {"teacher": LocalTeacher(make_model(seed=1)), "demonstrations": (), "per_device_train_batch_size": 4}
    return make_trainer(folder, rows=ROWS[:16], sampler=sampler, **{**settings, "learning_rate": 1e-2, **options})


def test_nothing_is_hard_at_first() -> None:
    """Before anything was ranked each example comes once an epoch, in an order of its own."""
    sampler = attached(40)
    first, second = list(sampler.order(0)), list(sampler.order(1))
    assert sorted(first) == sorted(second) == list(range(40)) and first != second


@pytest.mark.parametrize("times", [2, 3.5])
def test_hard_ones_come_so_many_times_as_often(times: float) -> None:
    """A factor that is off by one (once more instead of twice as often) teaches another mix."""
    sampler, hard = attached(2000, times=times), list(range(0, 2000, 5))
    sampler.course.record(0, 0, torch.tensor(hard))
    drawn = Counter(index for epoch in range(3) for index in sampler.order(epoch))
    often = sum(drawn[index] for index in hard) / len(hard)
    seldom = sum(drawn[index] for index in range(2000) if index % 5) / 1600
    assert sum(drawn.values()) == 6000 and often / seldom == pytest.approx(times, rel=0.06)


def test_what_is_hard_counts_from_its_place_on() -> None:
    """Draws that change before all processes could have heard of it are different draws."""
    sampler, before = attached(60, times=50.0), list(attached(60).order(0))
    sampler.course.record(0, 20, torch.tensor([7]))
    drawn = list(sampler.order(0))
    assert drawn[:20] == before[:20] and drawn[20:].count(7) > 5


def test_the_furthest_apart_are_hard(tmp_path: Path) -> None:
    """Ranked upside down, by sums instead of means, or by the other divergence, the wrong rows come more often."""
    found = {}
    for by in ("reverse_kl", "forward_kl"):
        sampler = HardPromptSampler(interval=1, examples=16, fraction=0.25, by=by)
        trainer = trainer_of(tmp_path, sampler, learning_rate=0.0, max_steps=1, per_device_eval_batch_size=3)
        trainer.train()
        student, teacher = (make_model(seed=seed).double() for seed in (0, 1))
        values = []
        for index in range(16):
            view = trainer.train_dataset[index]["student"]
            ids, learned = torch.tensor([view["input_ids"]]), torch.tensor(view["labels"])[1:] != -100
            with torch.no_grad():
                ours, theirs = (
                    one(input_ids=ids).logits[0, :-1][learned].log_softmax(-1) for one in (student, teacher)
                )
            first, second = (ours, theirs) if by == "reverse_kl" else (theirs, ours)
            values.append(float((first.exp() * (first - second)).sum(-1).mean()))
        wanted = np.argsort(values)[-4:]
        assert sampler.hard.nonzero()[:, 0].tolist() == sorted(wanted)
        entry = next(entry for entry in trainer.state.log_history if "hard_prompts/share" in entry)
        assert entry["hard_prompts/share"] == 0.25
        assert entry["hard_prompts/divergence"] == pytest.approx(np.mean(values), rel=1e-4)
        assert entry["hard_prompts/divergence_of_hard"] == pytest.approx(np.mean(np.sort(values)[-4:]), rel=1e-4)
        found[by] = entry["hard_prompts/divergence"]
    assert found["reverse_kl"] != pytest.approx(found["forward_kl"], rel=1e-3)


def test_hard_is_so_among_those_ranked_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against values of an earlier student, what was ranked first would be hard for ever."""
    from hfkd.sampling import hard

    heights = iter([np.array([9.0, 8.0, 7.0, 6.0]), np.array([0.4, 0.3, math.nan, 0.2])])
    asked: list[list[int]] = []
    monkeypatch.setattr(
        hard, "mean_by_group", lambda trainer, examples, groups, reading: asked.append(examples) or next(heights)
    )
    sampler = attached(12, examples=4, fraction=0.3)
    sampler.measure(None, 1)
    assert sampler.hard.nonzero()[:, 0].tolist() == asked[0][:2]  # 0.3 of 4, rounded up
    decision, figures = sampler.measure(None, 2)
    kept = [index for index in asked[0][:2] if index not in (asked[1][1], asked[1][3])]
    assert decision.tolist() == sorted({*kept, asked[1][0]}) and asked[0] != asked[1]
    assert figures["hard_prompts/divergence"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"interval": -1},
        {"examples": 0},
        {"fraction": 0.0},
        {"fraction": 1},
        {"times": 1},
        {"times": math.inf},
        {"times": "2"},
        {"by": "kl"},
    ],
)
def test_arguments_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    """At fraction 1, or once as often, nothing would be chosen."""
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is"):
        HardPromptSampler(**options)


def test_recipes_are_held_against_the_constructor() -> None:
    """A divergence that doesn't exist is found before a model is loaded."""
    assert load_recipe(RECIPE).data.sampler.kind == "hard_prompts"
    with pytest.raises(RecipeError, match="by is 'kl'"):
        load_recipe(RECIPE, ["data.sampler.by=kl"])
    with pytest.raises(RecipeError, match=r"data\.sampler.*teacher"):
        load_recipe(RECIPE, ["teacher={kind: none}", "loss.terms=[{kind: cross_entropy}]"])


def test_without_a_teacher_it_is_refused(tmp_path: Path) -> None:
    """There would be nothing to be far from."""
    with pytest.raises(ValueError, match="HardPromptSampler asks the teacher"):
        trainer_of(tmp_path, HardPromptSampler(), teacher=None, objective="cross_entropy").train()


def test_ranking_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    """Two steps with rankings that don't count yet are, to the last bit, two steps without."""
    found = []
    for interval in (1, 50):
        model, sampler = make_model(seed=0, attention_dropout=0.3), HardPromptSampler(interval=interval)
        trainer = trainer_of(tmp_path, sampler, model=model)
        trainer.train()
        assert bool(sampler.hard.any()) == (interval == 1)
        found.append({**trained_weights(trainer), "random": torch.get_rng_state()})
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


def test_a_resumed_run_draws_the_same(tmp_path: Path) -> None:
    """Step 3 is inside the first epoch, step 4 ends it, step 6 is inside the second."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}

    def sampler() -> HardPromptSampler:
        return HardPromptSampler(interval=1, examples=6, fraction=0.4, times=4)

    straight = trainer_of(tmp_path / "straight", whole := sampler(), **options)
    straight.train()
    for step in (3, 4, 6):
        folder = tmp_path / f"again-{step}"
        shutil.copytree(tmp_path / "straight" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = trainer_of(folder, resumed := sampler(), **options)
        again.train(resume_from_checkpoint=True)
        ours, theirs = trained_weights(straight), trained_weights(again)
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        assert all(value.equal(resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    with pytest.raises(ValueError, match="times is 2, and the checkpoint was made with 4"):
        other = HardPromptSampler(interval=1, examples=6, fraction=0.4)
        trainer_of(tmp_path / "again-3", other, **options).train(
            resume_from_checkpoint=str(tmp_path / "again-3" / "checkpoint-3")
        )
