"""The seams for what is learned: which examples come, what a step's batches become, and rows made of rows. Off, they
change no bit; on, they do what they say, are kept in checkpoints, and are refused early where they can't work.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deciding import lay_out
from rich.console import Console
from torch import Tensor
from training import ROWS, make_trainer, trained_weights

from hfkd.batch import Batch, View
from hfkd.checkpoint import load_companions
from hfkd.errors import CheckpointError, NothingToLearn
from hfkd.objective import Objective
from hfkd.reading import read_batch
from hfkd.recipe import RecipeError, load_recipe
from hfkd.recipe.parts import make_revisers, make_sampler, make_transforms
from hfkd.revision import Reviser
from hfkd.rows import DenseRows, Head
from hfkd.run import run_recipe
from hfkd.sampling import ExampleSampler
from hfkd.transforms import RowTransform, Workshop


class Backwards(ExampleSampler):
    """From the last example to the first; counts the steps that it heard of."""

    steps = 0

    def order(self, epoch: int) -> Iterator[int]:
        """Backwards."""
        return iter(range(len(self) - 1, -1, -1))

    def after_step(self, trainer: Any, step: int) -> dict[str, float]:
        """Count."""
        self.steps += 1
        return {"backwards/steps": float(self.steps)}

    def state_dict(self) -> dict[str, Tensor]:
        """The count."""
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The count."""
        self.steps = int(state["steps"])


class Watching(Reviser):
    """Changes nothing, and keeps what it saw."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.seen = scale, []

    def revise(self, batches: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Nothing."""
        self.seen.append((step, [batch["input_ids"].clone() for batch in batches]))
        return list(batches)

    def figures(self) -> dict[str, tuple[float, float]]:
        """How often it was called."""
        return {"watching/calls": (float(len(self.seen)), 1.0)}


class FirstRowOnly(Reviser):
    """Takes what is learned of all rows but the first away."""

    def revise(self, batches: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Labels of both views."""
        new = []
        for batch in batches:
            batch = dict(batch)
            for name in ("labels", "teacher_labels"):
                batch[name] = batch[name].clone()
                batch[name][1:] = -100
            new.append(batch)
        return new


class Keep(RowTransform):
    """The first rows."""

    def __init__(self, count: int) -> None:
        self.count = count

    def apply(self, rows: Sequence[dict[str, Any]], workshop: Workshop) -> list[dict[str, Any]]:
        """The first ones; looks whether the models are there."""
        assert workshop.student is not None and workshop.builder.tokenizer is not None and len(workshop.held_out) == 4
        return list(rows)[: self.count]

    def describe(self) -> dict[str, Any]:
        """The count."""
        return {"count": self.count}


def weights_after(folder: Path, **options: Any) -> dict[str, Tensor]:
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trained_weights(trainer)


def test_what_changes_nothing_changes_no_bit(tmp_path: Path) -> None:
    """A seam that costs a bit would make each run with a method incomparable with the run without it."""
    plain = weights_after(tmp_path / "plain")
    watched = weights_after(tmp_path / "watched", revisers=[Watching()])
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_a_sampler_says_which_examples_come(tmp_path: Path) -> None:
    """A sampler that is accepted and then passed over would leave the data mix as it was, silently."""
    watching, sampler = Watching(), Backwards()
    trainer = make_trainer(tmp_path, sampler=sampler, revisers=[watching])
    trainer.train()
    tokenizer = trainer.processing_class
    words = [tokenizer.decode(row) for _, batches in watching.seen for ids in batches for row in ids]
    asked = [row["prompt"] for row in reversed(ROWS[:16])]
    assert [f"Question: {word}\n" in text for word, text in zip(asked, words, strict=True)] == [True] * 16
    assert sampler.examples_per_step == 8 and sampler.seed == 3
    logged = [entry for entry in trainer.state.log_history if "backwards/steps" in entry]
    assert [entry["backwards/steps"] for entry in logged] == [1.0, 2.0]


def test_a_reviser_decides_what_is_counted(tmp_path: Path) -> None:
    """Tokens that aren't learned must not be divided by, else a selection changes the size of the loss."""
    trainer = make_trainer(tmp_path, revisers=[FirstRowOnly(), watching := Watching()])
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss/forward_kl" in entry]
    # the loss is the mean over what is learned: the term's own figure, which is divided by its tokens
    assert lines and all(abs(entry["loss"] - entry["loss/forward_kl"]) < 1e-4 for entry in lines)
    assert lines[-1]["watching/calls"] == 2.0 and [step for step, _ in watching.seen] == [0, 1]


def test_their_states_are_in_checkpoints(tmp_path: Path) -> None:
    """A sampler that forgets what it measured draws other examples after a resume; one that isn't there is named."""
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, sampler=Backwards(), **options).train()
    again = make_trainer(tmp_path, sampler=(sampler := Backwards()), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sampler.steps == 2
    plain, checkpoint = make_trainer(tmp_path, **options), str(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"\(decides_sampler_Backwards; now none\)"):
        plain.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match="decides_sampler_Backwards.safetensors, and this training has no such"):
        load_companions(checkpoint, plain.objective, plain.teacher)
    other = type("Other", (Backwards,), {})()
    with pytest.raises(CheckpointError, match="now decides_sampler_Other"):
        make_trainer(tmp_path, sampler=other, **options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match="no decides_sampler_Other.safetensors"):
        load_companions(checkpoint, plain.objective, plain.teacher, beside={"decides_sampler_Other": other})


@pytest.mark.parametrize("now", [[], [FirstRowOnly(), Watching()], [FirstRowOnly()]])
def test_what_has_no_state_is_asked_for_again(tmp_path: Path, now: list[Reviser]) -> None:
    """A reviser that is forgotten, added or exchanged at a resume would make the second half another training."""
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, revisers=[Watching()], **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    make_trainer(tmp_path, revisers=[Watching()], **options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=r"other samplers or revisers \(decides_reviser_0_Watching; now"):
        make_trainer(tmp_path, revisers=now, **options).train(resume_from_checkpoint=checkpoint)


def test_a_sampler_needs_rows(tmp_path: Path) -> None:
    """Found when the trainer is made, not when its loader asks."""
    with pytest.raises(ValueError, match="train_dataset is missing"):
        make_trainer(tmp_path, rows=None, sampler=Backwards())


def test_reading_a_batch_says_what_the_definition_says(tmp_path: Path) -> None:
    """Whatever is selected by wrong figures is wrongly selected. Dropout must be off, and the modes must come back."""
    trainer = make_trainer(tmp_path)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    figures = read_batch(trainer, inputs)
    assert trainer.model.training
    batch = Batch.from_inputs(inputs)
    with torch.no_grad():
        trainer.model.eval()
        ours = trainer.model(input_ids=batch.student.input_ids, attention_mask=batch.student.attention_mask).logits
        with trainer.model.disable_adapter():
            view = batch.teacher_view
            theirs = trainer.model(input_ids=view.input_ids, attention_mask=view.attention_mask).logits
    rows = [
        logits[:, :-1][one.labels[:, 1:] != -100].double().log_softmax(-1)
        for logits, one in ((ours, batch.student), (theirs, view))
    ]
    student, teacher = rows
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    assert kl.max() > 1e-3
    assert np.allclose(figures.forward_kl, kl, atol=1e-5)
    assert np.allclose(figures.student.entropy, -(student.exp() * student).sum(-1), atol=1e-4)
    assert np.array_equal(figures.teacher.top, teacher.argmax(-1))
    target = batch.student.targets[:, None]
    assert np.allclose(figures.teacher.log_prob, teacher.gather(-1, target)[:, 0], atol=1e-4)
    assert sorted(set(figures.text)) == list(range(8))


def test_reading_needs_a_teacher(tmp_path: Path) -> None:
    """An AttributeError of None would name nothing."""
    trainer = make_trainer(tmp_path, teacher=None, objective="cross_entropy", demonstrations=())
    with pytest.raises(ValueError, match="no teacher"):
        read_batch(trainer, next(iter(trainer.get_train_dataloader())))


class WeighSome(RowTransform):
    """Weights for all rows but the first, as where another transform adds rows behind one that weighs."""

    writes = ("token_weights",)

    def apply(self, rows: Sequence[dict[str, Any]], workshop: Workshop) -> list[dict[str, Any]]:
        """Half of the weight."""
        return [rows[0], *({**row, "token_weights": 0.5} for row in rows[1:])]


def made_rows(count: int = 6) -> tuple[DenseRows, DenseRows, Tensor]:
    torch.manual_seed(1)
    weight = torch.randn(11, 4)
    student, teacher = torch.randn(count, 4, requires_grad=True), torch.randn(count, 4)
    return DenseRows(student, Head(weight)), DenseRows(teacher, Head(weight)), torch.arange(count)


def test_private_tokens_teach_no_text() -> None:
    """The text itself would give away what a teacher's softened targets hide; what the teacher says stays whole."""
    from hfkd.signal import TeacherSignal

    student, teacher, targets = made_rows()
    private = torch.tensor([0.0, 1.0, 0.25, 0.0, 1.0, 0.5])
    objective = Objective([{"kind": "cross_entropy"}, {"kind": "forward_kl"}], chunk_size=4)
    found = objective(student, TeacherSignal(teacher), targets, private=private)
    log_probs = (student.hidden.detach() @ student.head.weight.T).log_softmax(-1)
    each = -log_probs.gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(found.parts["cross_entropy"], (each * (1 - private)).sum(), atol=1e-5)
    plain = objective(student, TeacherSignal(teacher), targets)
    assert torch.equal(found.parts["forward_kl"], plain.parts["forward_kl"])
    zero = objective(student, TeacherSignal(teacher), targets, private=torch.zeros(6))
    assert torch.equal(zero.total, plain.total)


def test_private_survives_the_way_to_the_trainer() -> None:
    """What a collator or a reviser sets is moved and sliced as a dictionary of tensors."""
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    view = View(torch.tensor([[1, 5, 6], [1, 2, 7]]), torch.ones(2, 3, dtype=torch.long), labels)
    batch = Batch(view, private=torch.tensor([0.5, 0.0, 1.0]))
    back = Batch.from_inputs(batch.to_inputs())
    assert torch.equal(back.private, batch.private) and back.token_weights is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lay_out([{"prompt": f"verb{number}", "completion": f"verb{number}ed"} for number in range(24)])
    return tmp_path


OWN = (
    "data.sampler={kind: 'test_deciding:Backwards'}",
    "data.revise=[{kind: 'test_deciding:Watching', scale: 2}]",
    "data.transforms=[{kind: 'test_deciding:Keep', count: 5}]",
)


def test_a_recipe_switches_them_on(folder: Path) -> None:
    """A key that is read and then forgotten is worse than an unknown one."""
    recipe = load_recipe("recipe.yaml", OWN)
    assert isinstance(make_sampler(recipe), Backwards) and make_revisers(recipe)[0].scale == 2
    assert make_transforms(recipe)[0].count == 5
    words = io.StringIO()
    result = run_recipe(recipe, console=Console(file=words, width=200))
    told = result.record.to_dict()["data"]["transforms"]
    assert told == [{"kind": "test_deciding:Keep", "before": 16, "after": 5, "count": 5}]
    assert "16 rows became 5" in words.getvalue()


def test_weights_that_a_transform_wrote_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that nobody reads change nothing; a row that came without one must count in full and not end the run."""
    seen: list[set[float]] = []
    counted = Objective.forward

    def counting(self: Objective, *args: Any, **kwargs: Any) -> Any:
        seen.append(set() if args[3] is None else set(args[3].tolist()))
        return counted(self, *args, **kwargs)

    monkeypatch.setattr(Objective, "forward", counting)
    changes = ["data.transforms=[{kind: 'test_deciding:WeighSome'}]", "training.max_steps=8"]
    run_recipe(load_recipe("recipe.yaml", changes), console=Console(file=io.StringIO()))
    assert set().union(*seen) == {0.5, 1.0}


def test_a_transform_that_leaves_nothing_stops_the_run(folder: Path) -> None:
    """Training on no rows would fail far from the setting that left none."""
    recipe = load_recipe("recipe.yaml", ["data.transforms=[{kind: 'test_deciding:Keep', count: 0}]"])
    with pytest.raises(NothingToLearn, match="left none of 16 rows"):
        run_recipe(recipe, console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.sampler={kind: domans}", "did you mean domains"),
        ("data.sampler={kind: domains, intreval: 3}", "did you mean interval"),
        ("data.sampler={kind: domains, interval: often}", "a whole number"),
        ("data.revise=[{kind: nothing}]", "no reviser 'nothing'"),
        ("data.transforms=[{kind: prune, keep: 3}]", "data.transforms.0: "),
        ("data.revise={kind: select}", "data.revise"),
        (
            "data={answer: student, train: {path: rows.jsonl}, demonstrations: {count: 4}, sampler: {kind: domains}}",
            "own answers",
        ),
    ],
)
def test_faults_are_found_before_anything_is_loaded(folder: Path, override: str, said: str) -> None:
    """A slip in a setting must not wait for the model and the teacher's answers."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", [override])
    assert said in str(caught.value)


def test_parts_that_ask_the_teacher_need_one(folder: Path) -> None:
    """Else the first step fails, or the part is passed over."""
    changes = ["teacher.kind=none", "loss.terms=[{kind: cross_entropy}]", "data.revise=[{kind: select}]"]
    with pytest.raises(RecipeError, match=r"data\.revise\.0: asks the teacher, and teacher\.kind is none"):
        load_recipe("recipe.yaml", changes)


def test_own_classes_are_told_before_they_are_imported(folder: Path) -> None:
    """A recipe from elsewhere brings code; nobody must be surprised by it."""
    from hfkd.recipe.own_code import own_code

    found = own_code(load_recipe("recipe.yaml", OWN))
    assert found["data.sampler.kind"] == "test_deciding:Backwards"
    assert {"data.revise.0.kind", "data.transforms.0.kind"} <= set(found)


def test_the_card_says_what_decided(folder: Path) -> None:
    """Who reads of a model must hear that half of its rows were left out, and that hiding is no guarantee."""
    from hfkd.card import build_card

    record = {
        "recipe": {
            "data": {
                "transforms": [{"kind": "prune", "keep": 0.5}],
                "revise": [{"kind": "private", "scorers": ["numbers|<b>"]}],
                "sampler": {"kind": "domains", "interval": 7},
            },
            "reinforcement": {"verifier": "reasoning_gym"},
        },
        "data": {"transforms": [{"kind": "prune", "before": 100, "after": 50}]},
    }
    card = build_card(record, {})
    assert "made 50 rows of 100 (keep: 0.5)" in card and "`domains` chose the examples of each step" in card
    assert "no guarantee of privacy" in card and "<b>" not in card
    assert "`reasoning_gym` judged what the student drew, and its word was learned" in card
    assert "What decided what was learned" not in build_card({"recipe": {}}, {})


@pytest.mark.parametrize(
    ("settings", "teacher", "kinds"),
    [
        ({}, "self", ["grpo", "k2"]),
        ({"policy_loss": "nft", "distillation_weight": 0}, "none", ["nft"]),
        ({"reward_weight": 0, "estimator": "k3", "distillation_weight": 1.0}, "self", ["k3"]),
    ],
)
def test_a_rewarded_run_says_what_it_learned(
    folder: Path, settings: dict[str, Any], teacher: str, kinds: list[str]
) -> None:
    """A card that names reverse KL and a teacher where neither had a say is untrue, and cites the wrong papers."""
    from hfkd.card import build_card
    from hfkd.run.rewarded_terms import rewarded_terms

    changes = [
        f"reinforcement={json.dumps({'verifier': 'exact', 'num_generations': 2, **settings})}",
        "data.answer=student",
    ]
    changes += ["data.generation.temperature=1.0", f"teacher.kind={teacher}"]
    recipe = load_recipe("recipe.yaml", changes)
    terms = rewarded_terms(recipe)
    assert [term["kind"] for term in terms] == kinds
    card = build_card({"recipe": recipe.resolved(), "objective": terms}, {})
    assert all(f"x `{kind}`" in card for kind in kinds) and "reverse_kl`:" not in card
    assert ("2505.18116" in card) == ("nft" in kinds) and ("2506.02208" in card) == ("k2" in kinds or "k3" in kinds)
