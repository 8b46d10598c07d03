"""`embedding_neighbours`: whom the head takes for alike, how much mass they get, and that little becomes nothing."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import make_model
from training import make_trainer, run, trained_weights

from hfkd.losses import EmbeddingNeighbours
from hfkd.objective import Objective, build_objective
from hfkd.rows import DenseRows, Head
from hfkd.support import TokenChunk
from hfkd.terms import Term

IDS, WIDTH = 41, 6


def head(seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(IDS, WIDTH, generator=torch.Generator().manual_seed(seed)) + offset


def shown(weight: torch.Tensor | None = None, **settings) -> EmbeddingNeighbours:
    loss = EmbeddingNeighbours(**settings)
    loss.read_head(head() if weight is None else weight)
    return loss


def rows(count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(IDS, (count,), generator=generator), 2 * torch.randn(count, IDS, generator=generator)


def by_definition(weight: torch.Tensor, target: int, neighbours: int, spread: float, cap: float) -> torch.Tensor:
    """The target distribution of one token, entry by entry in float64."""
    unit = weight.double() - weight.double().mean(0)
    unit = unit / unit.norm(dim=1, keepdim=True)
    distances = [float((unit[target] - other).norm()) for other in unit]
    nearest = sorted((place for place in range(len(unit)) if place != target), key=lambda place: distances[place])
    raw = {place: math.exp(-distances[place] / spread) for place in nearest[:neighbours]}
    share = sum(raw.values()) / (1 + sum(raw.values()))
    factor = min(1.0, cap / share) / (1 + sum(raw.values()))
    found = torch.zeros(len(unit), dtype=torch.float64)
    for place, value in raw.items():
        found[place] = factor * value
    found[target] = 1 - found.sum()
    return found


@pytest.mark.parametrize(("spread", "cap"), [(0.2, 0.2), (1.0, 0.9), (5.0, 0.3), (0.3, 0.0)])
def test_value_and_gradient_are_those_of_the_definition(spread, cap):
    """Prevents a target that sums to something else than 1, or a slope that isn't student minus target."""
    targets, logits = rows()
    leaf = logits.clone().requires_grad_(True)
    values = shown(neighbours=4, spread=spread, cap=cap)(TokenChunk(targets, leaf))
    (slope,) = torch.autograd.grad(values.sum(), leaf)
    mass = torch.stack([by_definition(head(), target, 4, spread, cap) for target in targets.tolist()])
    student = torch.log_softmax(logits.double(), -1)
    expected = (torch.special.xlogy(mass, mass) - mass * student).sum(-1)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), student.exp() - mass, rtol=1e-4, atol=1e-5)


def test_as_the_spread_shrinks_it_becomes_cross_entropy():
    """Prevents mass that stays away from the text's token however far the neighbours are."""
    targets, logits = rows()
    plain = -torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    apart = []
    for spread in (1.0, 0.3, 0.1, 0.02):
        chunk = TokenChunk(targets, logits)
        apart.append(float((shown(neighbours=4, spread=spread, cap=0.9)(chunk) - plain).abs().max()))
    assert apart[0] > 0.3 and apart == sorted(apart, reverse=True)
    assert apart[-1] < 1e-5


def test_a_head_with_one_large_common_direction_keeps_its_neighbours():
    """Prevents distances that are all alike, because every row of the head points the same way."""
    targets = torch.arange(IDS)
    for weight in (head(offset=0.0), head(offset=50.0)):
        near, _ = shown(weight, neighbours=3).target(targets, IDS)
        plain = head() - head().mean(0)
        plain = plain / plain.norm(dim=1, keepdim=True)
        alike = (plain @ plain.T).fill_diagonal_(-2)
        assert (near[:, 1:].sort(-1).values == alike.topk(3).indices.sort(-1).values).float().mean() > 0.95


def test_the_length_of_a_row_does_not_make_it_near():
    """Prevents rare tokens, whose rows are short, from being everybody's neighbours."""
    weight = head()
    longer = weight - weight.mean(0)
    scaled = longer * torch.linspace(0.1, 10, IDS)[:, None]
    scaled = torch.cat([scaled, -scaled])  # its mean is 0 again
    plain = torch.cat([longer, -longer])
    found = [shown(one, neighbours=3).target(torch.arange(IDS), 2 * IDS)[0] for one in (plain, scaled)]
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_head_and_the_order_of_tokens_change_nothing(monkeypatch, dtype):
    """Prevents neighbours that depend on which tokens came up before, or on where the head is cut."""
    weight = head().to(dtype)
    whole = shown(weight, neighbours=5)
    ids, mass = whole.target(torch.arange(IDS), IDS)
    monkeypatch.setattr("hfkd.losses.neighbours._IDS_AT_ONCE", 7)
    parts = shown(weight, neighbours=5)
    for some in torch.randperm(IDS, generator=torch.Generator().manual_seed(2)).split(3):
        again, theirs = parts.target(some, IDS)
        assert torch.equal(again, ids[some])
        torch.testing.assert_close(theirs, mass[some])


def test_ids_that_the_teacher_cuts_off_are_no_neighbours():
    """Prevents an index error, or mass on ids that aren't scored, where a teacher has a smaller vocabulary."""
    loss = shown(neighbours=5, cap=0.9, spread=1.0)
    assert int(loss.target(torch.arange(20), IDS)[0].max()) >= 20
    ids, mass = loss.target(torch.arange(20), 20)
    assert int(ids.max()) < 20
    torch.testing.assert_close(mass.sum(-1), torch.ones(20))


def test_an_objective_shows_it_the_head_and_chunks_change_nothing():
    """Prevents a loss that is cross-entropy in training, because nobody shows it the head."""
    model = make_model(seed=0)
    terms = [{"kind": "embedding_neighbours", "neighbours": 4, "spread": 1.0, "cap": 0.5}]
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(9) * 11
    sums = []
    for size in (None, 1, 4):
        objective = build_objective(terms, size)
        objective.prepare(model)
        sums.append(float(objective(DenseRows(hidden, Head.of(model)), None, targets).total.detach()))
    plain = build_objective("cross_entropy")(DenseRows(hidden, Head.of(model)), None, targets)
    assert sums == pytest.approx(sums[:1] * 3, rel=1e-5)
    assert abs(sums[0] - float(plain.total.detach())) > 0.1


@pytest.mark.parametrize("learns", [True, False])
def test_targets_stay_those_of_the_first_head(learns):
    """Prevents targets that follow the head they train, so that a resumed run has others; and a copy of a head that
    never changes.
    """
    weight = head().requires_grad_(learns)
    loss = shown(weight, neighbours=4)
    first = loss.target(torch.arange(IDS), IDS)
    assert (loss._head.data_ptr() == weight.data_ptr()) is not learns
    with torch.no_grad():
        weight[:] = head(seed=9)
    loss._known = None
    again = loss.target(torch.arange(IDS), IDS)
    assert torch.equal(first[0], again[0]) is learns


def test_the_head_follows_the_tokens_to_their_device(monkeypatch):
    """Prevents a kept head that stays where it was shown, when the model is placed on a device afterwards."""
    seen = []

    class Everyone:
        """Neighbours of any token, on the head's device."""

        def __init__(self, weight: torch.Tensor, count: int) -> None:
            self.vocab_size, self.count = len(weight), count
            seen.append(weight.device.type)

        def neighbours_of(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            ids = torch.zeros(len(targets), self.count, dtype=torch.long, device=seen[-1])
            return ids, ids.float()

    monkeypatch.setattr("hfkd.losses.neighbours._Known", Everyone)
    loss = shown(neighbours=3)
    for device in ("cpu", "meta", "meta"):
        _, mass = loss.target(torch.zeros(5, dtype=torch.long, device=device), IDS)
        assert mass.device.type == device
    assert seen == ["cpu", "meta"]


@pytest.mark.gpu
def test_a_head_that_was_shown_on_the_cpu_works_on_a_gpu():
    """Prevents a CPU tensor that is indexed with CUDA ids in the first step."""
    targets, logits = rows()
    loss = shown(neighbours=4)
    there = loss(TokenChunk(targets.cuda(), logits.cuda()))
    torch.testing.assert_close(there.cpu(), shown(neighbours=4)(TokenChunk(targets, logits)))


def test_it_is_not_kept_in_checkpoints():
    """Prevents a head in every checkpoint of the objective."""
    loss = shown()
    loss.target(torch.arange(3), IDS)
    assert not loss.state_dict() and not list(loss.parameters())
    assert copy.deepcopy(loss).target(torch.arange(3), IDS)[0].shape == (3, 17)


def test_a_run_learns_another_thing_than_with_cross_entropy(tmp_path):
    """Prevents a term that is accepted and does nothing in a training; and one that a training without it would
    feel.
    """
    neighbours = Term("near", EmbeddingNeighbours(neighbours=4, spread=1.0, cap=0.5))
    unfelt = Term("near", EmbeddingNeighbours(neighbours=4, spread=1.0, cap=0.0))
    trained = partial(run, teacher=None, max_steps=2, demonstrations=[])
    plain, losses = trained(tmp_path / "plain", objective="cross_entropy")
    other, others = trained(tmp_path / "near", objective=[neighbours])
    same, sames = trained(tmp_path / "cap", objective=[unfelt])
    assert sames == pytest.approx(losses, rel=1e-6)
    for name in plain:
        torch.testing.assert_close(same[name], plain[name], rtol=1e-4, atol=1e-7)
    assert others[0] != pytest.approx(losses[0], rel=1e-3)
    assert any(not torch.allclose(other[name], plain[name], rtol=1e-2) for name in plain)


def test_the_log_says_how_much_is_given_away(tmp_path):
    """Prevents a spread that gives all tokens nothing, or all tokens the cap, unseen."""
    terms = [{"kind": "embedding_neighbours", "neighbours": 4, "spread": 100.0, "cap": 0.3}]
    trainer = make_trainer(tmp_path, teacher=None, objective=terms, demonstrations=[])
    trainer.train()
    told = [entry["loss/embedding_neighbours/neighbours"] for entry in trainer.state.log_history if "loss" in entry]
    assert told == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": 0}, "neighbours is 0"),
        ({"neighbours": 2.5}, "neighbours is 2.5"),
        ({"spread": 0.0}, "spread is 0.0"),
        ({"spread": math.nan}, "spread is nan"),
        ({"cap": 1.0}, "cap is 1.0"),
        ({"cap": -0.1}, "cap is -0.1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    """Prevents a target with negative or no probabilities, found after an hour."""
    with pytest.raises(ValueError, match=message):
        EmbeddingNeighbours(**settings)


def test_more_neighbours_than_ids_are_refused():
    """Prevents a top-k error deep in a step."""
    with pytest.raises(ValueError, match="the student scores 41 ids"):
        shown(neighbours=41)


def test_nearer_neighbours_get_more():
    """Prevents masses in another order than the ids that they belong to."""
    _, mass = shown(neighbours=6, spread=0.5, cap=0.9).target(torch.arange(IDS), IDS)
    assert all((first >= second).all() for first, second in pairwise(mass[:, 1:].T))
    assert (mass[:, 1] > mass[:, 6]).all()


def test_showing_the_head_changes_nothing_for_other_losses(tmp_path, monkeypatch):
    """Prevents a hook that other losses feel: with and without it two steps end at the same weights, bit for bit."""
    found = []
    for folder in ("shown", "hidden"):
        trainer = make_trainer(tmp_path / folder)
        trainer.train()
        found.append(trained_weights(trainer))
        monkeypatch.setattr(Objective, "prepare", lambda self, student, teacher=None: None)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
