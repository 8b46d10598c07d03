"""Swing distillation: what is hidden of a private token, what isn't, and that nothing private changes nothing.

The loss as a measure like any other is tested by the battery in tests/losses/.
"""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from reference import swing as definition
from torch import Tensor
from training import ROWS, make_trainer, trained_weights

from hfkd.batch import Batch
from hfkd.losses import LOSSES, Divergence, Swing
from hfkd.losses.swing import MEASURES, _drawn, _mixed
from hfkd.rows import RowLayout, TopKRows
from hfkd.schedules import Schedule
from hfkd.support import TokenChunk

ROWS_HERE, IDS = 6, 37
MARKS = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.25, 1.0])


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits and targets."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(ROWS_HERE, IDS, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(IDS, (ROWS_HERE,), generator=generator)


def chunk(private: Tensor | None = MARKS, student: Tensor | None = None, **options) -> TokenChunk:
    ours, theirs, targets = case()
    return TokenChunk(targets, ours if student is None else student, theirs, private=private, **options)


def target(loss: Swing, private: Tensor) -> Tensor:
    """[n, V] the probabilities that the student is compared with."""
    return loss._shown(chunk(private)).log_probs(loss.temperature)[1].exp()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("private", [None, torch.zeros(ROWS_HERE)], ids=["not asked", "nothing private"])
def test_nothing_private_is_the_measure_to_the_last_bit(measure, private):
    """Prevents a loss that costs fidelity where there is nothing to hide."""
    options = {"alone": True} if measure == "sinkhorn" else {"spans": 3} if measure == "span_correlation" else {}
    torch.manual_seed(0)
    plain = LOSSES[measure](**options, temperature=2.0, scale_by_temperature_squared=True)
    torch.manual_seed(0)
    swing = Swing({"kind": measure, **options}, noise="laplace", temperature=2.0)
    results = []
    for loss in (plain, swing):
        student = case()[0].requires_grad_(True)
        value = loss(chunk(private, student))
        results.append((value.detach(), torch.autograd.grad(value.sum(), student)[0]))
    assert results[0][1].abs().max() > 1e-4
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_open_tokens_beside_private_ones_are_untouched(temperature):
    """Prevents one private token in a batch from blurring its neighbours."""
    plain = LOSSES["forward_kl"](temperature=temperature)(chunk())
    swing = Swing(noise="dirichlet", temperature=temperature)(chunk())
    open_rows = MARKS == 0
    assert torch.equal(plain[open_rows], swing[open_rows])
    assert ((plain - swing)[~open_rows].abs() > 1e-3).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("student_too", [False, True])
@pytest.mark.parametrize("noise", ["none", "uniform"])
@pytest.mark.parametrize("measure", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_value_and_gradient_equal_the_definition(measure, noise, student_too, temperature):
    """Prevents another loss than the docstring's formula: a factor tau ** 2, a temperature on the wrong side."""
    options = {"measure": measure, "max_temperature": 8.0, "noise": noise, "noise_share": 0.4}
    options |= {"student_too": student_too, "temperature": temperature}
    student, teacher, targets = case()
    ours, exact = student.clone().requires_grad_(True), student.double().requires_grad_(True)
    value = Swing(**options)(chunk(student=ours))
    expected = definition(exact, teacher, targets, private=MARKS, **options)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(one.sum(), leaf)[0].double() for one, leaf in ((value, ours), (expected, exact))]
    assert slopes[0].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_a_boundless_temperature_leaves_a_uniform_target_and_pulls_to_it():
    """Prevents a secret that still stands out in the target, or a gradient that leads back to the teacher."""
    loss, private = Swing(max_temperature=1e6), torch.ones(ROWS_HERE)
    torch.testing.assert_close(target(loss, private), torch.full((ROWS_HERE, IDS), 1 / IDS), atol=1e-6, rtol=1e-4)
    student = case()[0].requires_grad_(True)
    (slope,) = torch.autograd.grad(loss(chunk(private, student)).sum(), student)
    torch.testing.assert_close(slope, student.detach().softmax(-1) - 1 / IDS, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("student_too", [False, True])
def test_private_tokens_never_pull_harder_for_their_temperature(student_too):
    """Prevents Hinton's factor at a private token, where it would make the secret count most."""
    sizes = []
    for hottest in (1.5, 10.0, 100.0):
        student = case()[0].requires_grad_(True)
        value = Swing(max_temperature=hottest, student_too=student_too)(chunk(torch.ones(ROWS_HERE), student))
        sizes.append(float(torch.autograd.grad(value.sum(), student)[0].norm(dim=-1).max()))
    assert max(sizes) <= 2**0.5 and (not student_too or sizes == sorted(sizes, reverse=True))
    tempered = Swing(max_temperature=10.0, temperature=3.0)(chunk(torch.ones(ROWS_HERE)))
    plain = Swing(max_temperature=10.0, temperature=3.0, scale_by_temperature_squared=False)(
        chunk(torch.ones(ROWS_HERE))
    )
    assert torch.equal(tempered, plain)


@pytest.mark.parametrize("noise", ["uniform", "dirichlet", "laplace"])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_blurred_target_is_a_distribution(noise, share):
    """Prevents negative probabilities, or a target that doesn't sum to 1, which is another loss than a divergence."""
    found = target(Swing(noise=noise, noise_share=share), MARKS)
    clear = target(Swing(), MARKS)
    assert (found >= 0).all() and torch.isfinite(found.log()).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(ROWS_HERE), atol=1e-6, rtol=0)
    moved = (found - clear).abs().sum(-1)
    assert (moved[MARKS == 0] == 0).all() and (moved[MARKS > 0] > 1e-3).all()
    if noise != "laplace":  # which may add and cut off
        assert (moved <= 2 * share * MARKS + 1e-6).all()


@pytest.mark.parametrize("noise", ["dirichlet", "laplace"])
def test_noise_is_the_same_at_each_visit_and_for_each_row_another(noise):
    """Prevents noise that an average over epochs takes out again, and one pattern that could be learned as a bias."""
    loss = Swing(max_temperature=1e6, noise=noise, noise_share=1.0)
    ones = torch.ones(ROWS_HERE)
    first, again = target(loss, ones), target(Swing(max_temperature=1e6, noise=noise, noise_share=1.0), ones)
    assert torch.equal(first, again)
    order = torch.tensor([4, 2, 5])
    student, teacher, targets = case()
    part = TokenChunk(targets[order], student[order], teacher[order] + 1e-6, private=ones[:3])
    torch.testing.assert_close(loss._shown(part).log_probs()[1].exp(), first[order])
    assert all((first[0] - row).abs().max() > 1e-2 for row in first[1:])
    other = target(Swing(max_temperature=1e6, noise=noise, noise_share=1.0, seed=1), ones)
    assert (first - other).abs().max() > 1e-2


def test_the_texts_token_does_not_choose_the_noise():
    """Prevents a noise from which whoever knows the seed reads which token was to be hidden."""
    student, teacher, targets = case()
    loss = Swing(noise="dirichlet")
    first, second = (
        loss._shown(TokenChunk(some, student, teacher, private=MARKS)).log_probs()[1]
        for some in (targets, (targets + 1) % IDS)
    )
    assert torch.equal(first, second)


def test_drawn_numbers_are_uniform_and_do_not_hang_together():
    """Prevents noise with a pattern: neighbouring ids, or rows whose numbers are neighbours."""
    drawn = _drawn(torch.arange(400), torch.arange(1000)[None], 0).double()
    assert drawn.min() > 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 2e-3 and abs(drawn.var() - 1 / 12) < 1e-3
    centred = (drawn - 0.5) * math.sqrt(12)
    for first, second in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((first * second).mean()) < 8e-3
    assert len(_mixed(torch.arange(10_000)).unique()) == 10_000


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("noise", ["none", "uniform", "dirichlet", "laplace"])
def test_a_list_of_all_ids_is_the_dense_teacher(noise, temperature):
    """Prevents a cached run that hides something else than a live one; random noise differs, its size does not."""
    student, teacher, targets = case()
    known, ids = (teacher / temperature).log_softmax(-1).topk(IDS, -1)
    loss = Swing(noise=noise, noise_share=0.3, temperature=temperature)
    dense = loss._shown(chunk()).log_probs(temperature)[1]
    listed = loss._shown(TokenChunk(targets, student, TopKRows(ids, known, IDS, temperature), private=MARKS))
    spread = torch.full_like(dense, -torch.inf).scatter(-1, ids, listed.log_probs(temperature)[1])
    if noise in ("none", "uniform"):
        torch.testing.assert_close(spread, dense, atol=1e-5, rtol=1e-5)
    else:
        assert (spread.exp() - dense.exp()).abs().sum(-1)[MARKS == 1].mean() < 2 * 0.3


@pytest.mark.parametrize("noise", ["none", "uniform", "dirichlet", "laplace"])
def test_a_sparse_teachers_tail_counts_as_so_many_ids(noise):
    """Prevents a tail that takes the same share as each listed id: the listed ones would stand out for ever."""
    student, teacher, targets = case()
    known, ids = teacher.log_softmax(-1).topk(5, -1)
    loss = Swing(max_temperature=1e6, noise=noise)
    results = []
    for order in (torch.arange(5), torch.tensor([3, 0, 4, 1, 2])):
        rows = TopKRows(ids[:, order], known[:, order], IDS)
        shown = loss._shown(TokenChunk(targets, student, rows, private=MARKS)).log_probs()[1].exp()
        results.append(shown)
        torch.testing.assert_close(shown.sum(-1), torch.ones(ROWS_HERE), atol=1e-5, rtol=0)
        tail = shown[MARKS == 1, -1]
        assert ((tail - (IDS - 5) / IDS).abs() < 0.1).all()
        kept = TokenChunk(targets, student, rows).log_probs()[1].exp()[MARKS == 0, -1]
        torch.testing.assert_close(shown[MARKS == 0, -1], kept, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("noise", ["dirichlet", "laplace"])
def test_each_row_of_a_cache_has_noise_of_its_own(noise):
    """Prevents one pattern for all rows of a sparse teacher, which a student learns as a bias and takes off again."""
    student, _, targets = case()
    ids = torch.tensor([[1, 2, 3, 4, 10 + row] for row in range(ROWS_HERE)])
    rows = TopKRows(ids, torch.full((ROWS_HERE, 5), 0.1).log(), IDS)
    loss = Swing(max_temperature=1e6, noise=noise, noise_share=1.0)
    ones = torch.ones(ROWS_HERE)
    shown = loss._listed(TokenChunk(targets, student, rows, private=ones), 1e6 * ones)
    order = shown.ids.argsort(dim=-1)[:, :4]  # the ids that all rows list
    of_same_ids = shown.log_probs.gather(-1, order).double()
    ratios = of_same_ids[:, :3] - of_same_ids[:, 3:]
    apart = (ratios[:, None] - ratios[None]).abs().amax(-1)
    assert (apart[~torch.eye(ROWS_HERE, dtype=torch.bool)] > 1e-2).all()


def test_the_noise_of_a_tail_is_that_of_the_ids_behind_it():
    """Prevents noise that goes to the tail twice as much as to the ids that a dense teacher has there."""
    generator, count, width, kept = torch.Generator().manual_seed(1), 200, 300, 4
    teacher = torch.randn(count, width, generator=generator)
    teacher[:, :kept] += 40.0  # the others' own mass is nothing
    student, targets, ones = (
        torch.randn(count, width, generator=generator),
        torch.zeros(count).long(),
        torch.ones(count),
    )
    loss = Swing(max_temperature=1.0, noise="laplace", noise_share=0.2)
    dense = loss._shown(TokenChunk(targets, student, teacher, private=ones)).log_probs()[1].exp()[:, kept:].sum(-1)
    known, ids = teacher.log_softmax(-1).topk(kept, -1)
    rows = TopKRows(ids, known, width)
    listed = loss._shown(TokenChunk(targets, student, rows, private=ones)).log_probs()[1].exp()[:, -1]
    torch.testing.assert_close(listed.mean(), dense.mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("noise", ["none", "dirichlet", "laplace"])
def test_every_measure_is_finite_on_private_tokens(measure, noise):
    """Prevents NaN from a divergence that meets a target which noise cut down to nothing."""
    options = {"alone": True} if measure == "sinkhorn" else {}
    for hot in (1.0, 40.0):
        student, teacher, targets = case()
        student = (hot * student).requires_grad_(True)
        loss = Swing({"kind": measure, **options}, noise=noise, noise_share=1.0)
        value = loss(TokenChunk(targets, student, hot * teacher, private=MARKS))
        (slope,) = torch.autograd.grad(value.sum(), student)
        assert torch.isfinite(value).all() and torch.isfinite(slope).all()
        assert value.abs().max() < 1e3


def test_what_a_measure_is_holds_for_swing_too():
    """Prevents a loss on the student's own text, or one alone, that its measure would refuse."""
    assert Swing("adaptive_label_smoothing").learns_text and not Swing().learns_text
    assert not Swing("sinkhorn").may_stand_alone and Swing().may_stand_alone
    layout = RowLayout.single(5, torch.device("cpu"))
    grouped = Swing({"kind": "sinkhorn", "group_size": 2}).groups(layout)
    assert Swing().groups(layout) is None and grouped.tolist() == [0, 0, 1, 1, 2]
    assert copy.deepcopy(Swing("sinkhorn")).groups(layout).shape == (5,)
    chunked = chunk()
    Swing("adaptive_label_smoothing")(chunked)
    assert set(chunked.measures) == {"smoothing"}


def test_measures_are_the_divergences_of_probabilities():
    """Prevents a new divergence that swing doesn't know of without a reason."""
    others = {
        *("logit_binary_kl", "logit_mse", "standardized_kl", "hinge_ranking", "logistic_ranking"),  # see through it
        *("uld", "span_likelihood"),  # another vocabulary
        "swing",
    }
    known = {kind for kind, loss in LOSSES.items() if issubclass(loss, Divergence)}
    assert set(MEASURES) == known - others


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measure": "logit_mse"}, "measure is 'logit_mse'; expected a divergence of probabilities"),
        ({"measure": "swing"}, "measure is 'swing'"),
        ({"measure": {"skew": 0.1}}, "measure is None"),
        ({"measure": {"kind": "forward_kl", "temperature": 2.0}}, "has temperature; give it to swing itself"),
        ({"measure": {"kind": "skew_forward_kl", "skew": 3}}, "the measure 'skew_forward_kl': skew_forward_kl: skew"),
        ({"measure": {"kind": "forward_kl", "skew": 3}}, "the measure 'forward_kl'"),
        ({"max_temperature": 0.5}, "max_temperature is 0.5; expected a number, at least the temperature (1.0)"),
        ({"max_temperature": math.inf}, "max_temperature is inf"),
        ({"max_temperature": math.nan}, "max_temperature is nan"),
        ({"max_temperature": 1.0}, "nothing would be hidden"),
        ({"noise": "gauss"}, "expected one of none, uniform, dirichlet, laplace"),
        ({"noise_share": 0.0}, "noise_share is 0.0; expected a number above 0"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
    ],
)
def test_wrong_settings_are_refused_at_once(options, words):
    """Prevents a run that hides nothing, or something else than was meant."""
    with pytest.raises(ValueError, match=re.escape(words)):
        Swing(**options)


def test_a_scheduled_temperature_reaches_the_measure():
    """Prevents two temperatures in one loss: one for open tokens and an old one for private ones."""
    loss = Swing(temperature=Schedule("linear", start=4.0, end=1.0))
    loss.set_step(10, 10)
    assert loss.temperature == loss.measured.temperature == 1.0
    torch.testing.assert_close(loss(chunk()), Swing()(chunk()))


def test_private_tokens_are_hidden_in_a_training(tmp_path):
    """Prevents scores that get lost on the way from the batch to the loss, in blocks and chunks of rows."""

    def update(hidden: bool, chunk_size: int | None) -> dict[str, Tensor]:
        trainer = make_trainer(tmp_path, objective="swing", rows=ROWS[:16], chunk_size=chunk_size)
        before = trained_weights(trainer)
        batch = next(iter(trainer.get_train_dataloader()))
        if hidden:
            batch["private"] = (batch["labels"] % 2 == 0).float()
        trainer.objective_sum(trainer.model, Batch.from_inputs(batch)).total.backward()
        return {name: dict(trainer.model.named_parameters())[name].grad for name in before}

    whole, small, shown = update(True, None), update(True, 3), update(False, None)
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, small[name], rtol=1e-3, atol=1e-5)
    assert any((gradient - shown[name]).abs().max() > 1e-3 for name, gradient in whole.items())
