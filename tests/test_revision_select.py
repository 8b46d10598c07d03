"""What `select` keeps: thresholds, weights, both views, and what happens when nothing is left."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from conftest import make_model
from deciding import batch_of, fake_trainer, figures, log, make_trainer, trained
from test_writer import ending_in
from training import ROWS, trained_weights

from hfkd import LocalTeacher
from hfkd.batch import Batch
from hfkd.data.collate import DistillationCollator
from hfkd.data.views import DistillationDataset
from hfkd.errors import NothingToLearn
from hfkd.reading import read_batch
from hfkd.revision import REVISERS, select
from hfkd.revision.select import Selection, items_of
from hfkd.revision.thresholds import MovingThreshold
from hfkd.revision.tokens import weighed, with_only

CONFIDENCE, NEED = [0.9, 0.9, 0.4, 0.4], [0.8, 0.1, 0.8, 0.1]
FOUR = [[11], [12], [13], [14]]


def reading(monkeypatch, *batches):
    """Let student and teacher say this of the coming micro-batches, over and over."""
    said = list(batches)

    def read(trainer, inputs):
        said.append(said.pop(0))
        return said[-1]

    monkeypatch.setattr(select, "read_batch", read)


def four_items(confidence=CONFIDENCE, need=NEED):
    """One token each, with these signals."""
    sides = {"log_prob": np.log(confidence), "confidence": confidence}, {"entropy": np.array(need) * math.log(384)}
    return figures([0, 1, 2, 3], teacher=sides[0], student=sides[1])


def attached(**settings) -> Selection:
    """A selection in a trainer whose vocabulary has 384 ids."""
    selection = Selection(**settings)
    selection.attach(fake_trainer())
    return selection


@pytest.mark.parametrize("by", ["sequence", "token"])
def test_four_items_of_which_one_is_sure_and_needed(monkeypatch, by):
    """With one of the two signs turned round, a student learns what it knows, or what its teacher guesses."""
    reading(monkeypatch, four_items())
    chosen = attached(by=by, confidence=0.5, need=0.5)
    (batch,) = chosen.revise([batch_of(FOUR)], 0)
    assert batch["labels"].tolist() == [[-100, -100, 11], *[[-100] * 3] * 3]
    assert batch["teacher_labels"].tolist() == [[-100] * 4 + [11], *[[-100] * 5] * 3]
    assert chosen.figures()["selection/kept"] == (1.0, 4.0)
    assert Batch.from_inputs(batch).token_weights.tolist() == pytest.approx([1.0]), "the mean of one weight is itself"


def test_weights_are_worth_over_its_mean_on_what_is_kept(monkeypatch):
    """Weights over the mean of all items shrink the loss with what is left out: another learning rate at each step."""
    reading(monkeypatch, four_items(need=[0.8, 0.6, 0.8, 0.1]))
    batch = {**batch_of(FOUR), "token_weights": torch.full((4, 3), 2.0)}
    (batch,) = attached(confidence=0.5, need=0.5).revise([batch], 0)
    assert Batch.from_inputs(batch).token_weights.tolist() == pytest.approx([2 * 0.72 / 0.63, 2 * 0.54 / 0.63])
    reading(monkeypatch, four_items())
    (batch,) = attached(confidence=0.5, need=0.5, weighted=False).revise([batch_of(FOUR)], 0)
    assert "token_weights" not in batch


def test_the_mean_goes_over_all_tokens_that_are_kept(monkeypatch):
    """Each micro-batch by itself, or each sequence as one, would make long and short answers count unlike."""
    long = figures([0, 0, 0], teacher={"log_prob": np.log([0.9] * 3)}, student={"entropy": [math.log(384)] * 3})
    short = figures([0], teacher={"log_prob": np.log([0.6])}, student={"entropy": [0.5 * math.log(384)]})
    reading(monkeypatch, long, short)
    chosen = attached(confidence=0.0, need=0.0)
    weights = [
        Batch.from_inputs(each).token_weights for each in chosen.revise([batch_of([[5, 6, 7]]), batch_of([[8]])], 0)
    ]
    mean = (3 * 0.9 + 0.3) / 4
    assert torch.cat(weights).tolist() == pytest.approx([0.9 / mean] * 3 + [0.3 / mean])


def test_a_sequence_is_as_sure_as_its_tokens_on_average():
    """The product of probabilities calls each long answer unsure; so would a token that a cache doesn't list."""
    log_probs = [math.log(0.5), math.log(0.125), math.log(0.9)]
    said = figures(
        [0, 0, 2],
        teacher={"log_prob": log_probs, "confidence": [0.5, 0.7, 0.9]},
        student={"entropy": [math.log(10), 0.0, math.log(100)]},
    )
    items = items_of(said, np.array([0, 1, 2]), 100, "sequence")
    assert items.of_token.tolist() == [0, 0, 1] and items.tokens.tolist() == [2, 1]
    assert items.group.tolist() == [0, 2], "a row without a token is no item"
    assert items.confidence == pytest.approx([0.25, 0.9]) and items.need == pytest.approx([0.25, 1.0])
    by_token = items_of(said, np.array([0, 1, 2]), 100, "token")
    assert by_token.confidence == pytest.approx([0.5, 0.7, 0.9]) and by_token.need == pytest.approx([0.5, 0, 1])
    said.teacher.log_prob[1] = np.nan
    unlisted = items_of(said, np.array([0, 1, 2]), 100, "sequence")
    assert unlisted.confidence[0] == pytest.approx(math.sqrt(0.5 * 0.3)), "it can't have more than the top one leaves"


def test_a_mean_goes_to_what_it_hears():
    """A mean that begins at 0, or overshoots, keeps everything or nothing for the first hundred steps."""
    moving = MovingThreshold(1, 0.8)
    moving.hear(np.array([4 * 0.9]), np.array([4.0]))
    assert moving.thresholds() == pytest.approx([0.9]), "begins with the first value"
    seen = []
    for _ in range(30):
        moving.hear(np.array([2 * 0.3]), np.array([2.0]))
        seen.append(moving.thresholds()[0])
    assert seen[0] == pytest.approx(0.8 * 0.9 + 0.2 * 0.3)
    assert all(later < earlier for earlier, later in zip(seen, seen[1:], strict=False)) and 0.3 < seen[-1] < 0.301


def test_a_hard_domain_has_less_to_reach():
    """One threshold for all leaves out whole domains: the ones where there is most to learn."""
    moving = MovingThreshold(3, 0.5)
    moving.hear(np.array([1.8, 0.4, 0.0]), np.array([2.0, 1.0, 0.0]))
    overall = 2.2 / 3
    assert moving.thresholds()[:2] == pytest.approx([overall, overall * 0.4 / 0.9])
    assert np.isnan(moving.thresholds()[2]), "never seen"
    moving.hear(np.array([0.5, 0.0, 0.3]), np.array([1.0, 0.0, 1.0]))
    overall = 0.5 * overall + 0.5 * 0.4
    assert moving.thresholds() == pytest.approx(np.array([0.7, 0.4, 0.3]) / 0.7 * overall)


def test_equal_items_are_all_kept(monkeypatch):
    """A mean that is rounded up by one bit would leave out a whole step of items that are alike."""
    same = figures([0, 1, 2], teacher={"log_prob": [math.log(0.7)] * 3}, student={"entropy": [1.1] * 3})
    reading(monkeypatch, same)
    chosen = attached()
    for step in range(20):
        chosen.revise([batch_of(FOUR[:3])], step)
        assert chosen.figures()["selection/kept"] == (3.0, 3.0)


def test_a_step_that_keeps_nothing_weighs_nothing(tmp_path):
    """No token divides by zero, and a NaN in the update ends the run; or the optimizer learns what was left out."""
    trainer = make_trainer(tmp_path, [Selection(confidence=1.0)])
    update = trained(trainer)
    assert log(trainer, "loss") == [0.0, 0.0] and log(trainer, "selection/kept") == [0.0, 0.0]
    assert all(float(value.abs().max()) == 0 for value in update.values())


def test_fifty_steps_without_anything_are_the_end(monkeypatch):
    """A run that learns nothing for hours looks like one that has converged: loss 0."""
    nothing, chosen = four_items(confidence=[0.3] * 4), attached(confidence=0.9, need=0.2)
    reading(monkeypatch, nothing)
    for step in range(49):
        (batch,) = chosen.revise([batch_of(FOUR)], step)
    assert batch["labels"].tolist() == batch_of(FOUR)["labels"].tolist() and not batch["token_weights"].any()
    resumed = attached(confidence=0.9, need=0.2)
    resumed.load_state_dict(chosen.state_dict())
    with pytest.raises(NothingToLearn, match=r"50 steps in a row have kept nothing.*confidence \[0.9\].*0.3000"):
        resumed.revise([batch_of(FOUR)], 49)
    reading(monkeypatch, four_items(confidence=[0.95] * 4))
    chosen.revise([batch_of(FOUR)], 49)
    reading(monkeypatch, nothing)
    for step in range(49):
        chosen.revise([batch_of(FOUR)], step)


def test_a_step_without_any_token_is_the_trainers_affair(monkeypatch):
    """It says what is wrong with the data; fifty quiet steps of selection would hide it."""
    reading(monkeypatch, figures([]))
    batch = with_only(batch_of(FOUR), [False] * 4)
    chosen = attached()
    assert chosen.revise([batch], 0) == [batch] and not int(chosen.state_dict()["empty_steps"])


def test_switched_to_keep_everything_it_changes_nothing(tmp_path):
    """Reading a batch first must not draw a random number, leave a mode switched or touch a gradient."""
    dropout = {"teacher": LocalTeacher(make_model(seed=1)), "demonstrations": [], "optim": "adamw_torch"}

    def model():
        return make_model(seed=0, attention_dropout=0.3)

    plain = trained(make_trainer(tmp_path / "a", model=model(), **dropout))
    everything = Selection(confidence=0.0, need=0.0, weighted=False)
    same = make_trainer(tmp_path / "b", [everything], model=model(), **dropout)
    update = trained(same)
    assert all(torch.equal(plain[name], update[name]) for name in plain)
    assert log(same, "selection/kept") == [1.0, 1.0]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_it_learns_what_the_kept_rows_alone_would_teach(tmp_path, accumulation):
    """What is left out must be out of the count too, in whatever micro-batch it lay, one that is empty included."""
    batch = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path / "a", [Selection(need=0.0, weighted=False)], max_steps=1, **batch)
    kept: list[torch.Tensor] = []
    revise = trainer.revisers[0].revise

    def noting(batches, step):
        new = revise(batches, step)
        kept.extend(each["labels"][row] for each in new for row in range(len(each["labels"])))
        return new

    trainer.revisers[0].revise = noting
    update = trained(trainer)
    chosen = [tokens[tokens != -100].tolist() for tokens in kept if (tokens != -100).any()]
    assert 0 < len(chosen) < 8
    encode = trainer.processing_class
    rows = [row for row in ROWS[:16] if encode(f" {row['completion']}\n")["input_ids"] in chosen]
    rows = rows if len(rows) == len(chosen) else []
    assert rows, "the answers tell the rows apart"
    alone = make_trainer(tmp_path / "b", rows=rows, max_steps=1, per_device_train_batch_size=len(rows))
    expected = trained(alone)
    gap = max(float((expected[name] - update[name]).norm() / expected[name].norm()) for name in expected)
    assert gap < 1e-5


def test_domains_have_thresholds_of_their_own(tmp_path):
    """Domains that are mixed up, or lost on the way to the batch, give each the threshold of another."""
    trainer = make_trainer(tmp_path, [Selection(per="domain", by="token", decay=0.0)], max_steps=1)
    assert trainer.train_dataset.groups == ["long", "short"]
    seen: list = []
    revise = trainer.revisers[0].revise

    def noting(batches, step):
        seen.extend((each, read_batch(trainer, each)) for each in batches)
        return revise(batches, step)

    trainer.revisers[0].revise = noting
    trained(trainer)
    ((inputs, said),) = seen
    rows = inputs["group"].numpy()[said.text]
    means = [said.teacher.confidence[rows == number].mean() for number in (0, 1)]
    overall = said.teacher.confidence.mean()
    wanted = [overall * mean / max(means) for mean in means]
    found = [log(trainer, f"selection/{name}/confidence_threshold")[0] for name in ("long", "short")]
    assert found == pytest.approx(wanted, rel=1e-5) and wanted[0] != pytest.approx(wanted[1], rel=1e-3)
    shares = [log(trainer, f"selection/{name}/kept")[0] for name in ("long", "short")]
    assert all(0 < share < 1 for share in shares)


def test_groups_follow_the_column(tokenizer):
    """Half a column would put the rows without a domain into somebody else's."""
    from hfkd.data.prompts import PromptBuilder, PromptStyle

    def dataset(domains):
        rows = [
            {**row, **({} if name is None else {"domain": name})} for row, name in zip(ROWS, domains, strict=False)
        ]
        return DistillationDataset(rows[: len(domains)], PromptBuilder(tokenizer, PromptStyle()))

    found = dataset(["b", "a", "b"])
    inputs = DistillationCollator(2)([found[index] for index in range(3)])
    assert found.groups == ["a", "b"] and inputs["group"].tolist() == [1, 0, 1]
    plain = dataset(["b", None, "b"])
    assert not plain.groups and "group" not in DistillationCollator(2)([plain[0], plain[1]])


def test_a_step_that_keeps_nothing_moves_nothing(tmp_path):
    """AdamW goes on by its momentum, and decays weights, where the gradient is 0: nine such steps moved three times as
    far as a full one may.
    """

    class First(Selection):
        def _reaches(self, items):
            return np.full(len(items.need), self.trainer.state.global_step in (0, 4))

    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}
    weights = {}
    for steps in (1, 4, 5):
        trainer = make_trainer(tmp_path, [First()], max_steps=steps, **options)
        trainer.train()
        weights[steps] = trained_weights(trainer)
    assert all(torch.equal(weights[1][name], weights[4][name]) for name in weights[1])
    assert any(not torch.equal(weights[4][name], weights[5][name]) for name in weights[1]), "it learns on afterwards"


def test_a_resumed_run_goes_on_with_its_thresholds(tmp_path):
    """Thresholds that begin anew keep other rows than the run that was never interrupted."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05}
    straight = make_trainer(tmp_path / "a", [Selection(per="domain")], **settings)
    straight.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    resumed = make_trainer(tmp_path / "b", [Selection(per="domain")], **settings)
    resumed.train(resume_from_checkpoint=True)
    wanted, found = (dict(each.model.named_parameters()) for each in (straight, resumed))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert log(resumed, "selection/long/kept")[-3:] == log(straight, "selection/long/kept")[-3:]
    other = Selection()
    other.attach(fake_trainer())
    with pytest.raises(ValueError, match="thresholds for 2 domains, and the rows have 1"):
        other.load_state_dict(straight.revisers[0].state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "row"}, "by is 'row'; expected 'sequence' or 'token'"),
        ({"per": "class"}, "per is 'class'; expected 'none' or 'domain'"),
        ({"confidence": 90}, "confidence is 90; expected a number from 0 to 1, or null"),
        ({"need": True}, "need is True"),
        ({"decay": 1.0}, "decay is 1.0; expected a number from 0 to below 1"),
        ({"weighted": 1}, "weighted is 1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    """A threshold in percent keeps nothing, and a decay of 1 never moves: both train for hours first."""
    with pytest.raises(ValueError, match=message):
        Selection(**settings)


def test_what_the_trainer_lacks_is_said_at_once(tmp_path):
    """Without a teacher, or without its own prompt, what is kept would be decided by something else."""
    with pytest.raises(ValueError, match="there is no teacher"):
        Selection().attach(fake_trainer(teacher=None))
    with pytest.raises(ValueError, match="no value in the column 'domain' of some row"):
        make_trainer(tmp_path, [Selection(per="domain")], rows=ROWS[:8])
    one = [{**row, "domain": "verbs"} for row in ROWS[:8]]
    with pytest.raises(ValueError, match="only the domain 'verbs'"):
        make_trainer(tmp_path, [Selection(per="domain")], rows=one)
    with pytest.raises(ValueError, match="written during training"):
        make_trainer(tmp_path, [Selection(per="domain")], answer="student", rollout=ending_in())
    with pytest.raises(ValueError, match="has no `group`"):
        chosen = Selection(per="domain")
        chosen.trainer = fake_trainer()
        chosen.revise([batch_of(FOUR)], 0)


def test_a_batch_keeps_what_else_it_has():
    """Weights multiply, and a new batch must not write into the old one."""
    batch = batch_of([[5, 6], [7]])
    new = weighed(with_only(batch, [True, False, True]), [0.5, 2.0])
    again = Batch.from_inputs(weighed(new, [3.0, 3.0]))
    assert again.student.targets.tolist() == again.teacher.targets.tolist() == [5, 7]
    assert again.token_weights.tolist() == [1.5, 6.0]
    assert batch["labels"].tolist() == batch_of([[5, 6], [7]])["labels"].tolist() and "token_weights" not in batch


def test_the_recipe_key():
    """A key that leads nowhere is found only when the recipe runs."""
    assert REVISERS["select"] == f"{Selection.__module__}:{Selection.__name__}"
