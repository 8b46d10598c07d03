"""Which tokens are private: scorers of text and of ids, and the reviser that writes their scores into batches."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer
from training import ROWS, make_trainer, trained_weights

from hfkd.batch import IGNORE, Batch
from hfkd.card.limits import _HEEDING, limits
from hfkd.losses import LOSSES
from hfkd.privacy import PATTERNS, RarityScorer, SpanScorer, pattern_finder, placed
from hfkd.recipe import load_recipe
from hfkd.recipe.source import RecipeError
from hfkd.revision import REVISERS
from hfkd.revision.private import ALL_MARKED_STEPS, NONE_MARKED_STEPS, PrivateTokens

TEXT = "Write to ann.b+x@mail.example.org, code 4821, call +49 (30) 555-1234, key AB12-9XQ, 3 of 12."


def found(text: str, *names: str, **options) -> list[str]:
    """What some patterns find."""
    return [text[start:end] for start, end in pattern_finder(list(names), **options)(text)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("emails", ["ann.b+x@mail.example.org"]),
        ("numbers", ["4821", "49 (30) 555-1234"]),
        ("ids", ["AB12-9XQ"]),
    ],
)
def test_patterns_find_what_they_are_named_for(name, expected):
    """Prevents a pattern that lets half of an address through, or that takes every number for a secret."""
    assert found(TEXT, name) == expected


def test_numbers_count_from_so_many_digits():
    """Prevents `min_digits` that isn't heard: short numbers are most of what a model is to learn."""
    assert found("pin 12, code 4821", "numbers", min_digits=2) == ["12", "4821"]
    assert found("pin 12, code 4821", "numbers", min_digits=5) == []
    assert found("2 4 6 8", "numbers", min_digits=5) == []


@pytest.mark.parametrize(
    "number",
    ["078 - 05 - 1120", "040 / 123 45", "040) - 12345", "4\n8\n2\n1", "4\u20138\u20142\u20101", "49\u00a030\u00a0555"],
)
def test_a_number_is_found_whole_however_it_is_written(number):
    """Prevents the first half of a telephone number from being taught openly beside its hidden second half."""
    assert found(f"tel {number}, or so.", "numbers") == [number]
    assert found("in 12.\n\n34 people", "numbers") == [], "two sentences are no number"


def test_long_runs_without_a_space_take_no_longer_by_the_square():
    """Prevents seconds for each row and step on base64, or on scripts that set no spaces."""
    start = time.perf_counter()
    for run in ("a" * 200_000, "x" * 64 + "@" + "b" * 200_000):
        assert found(run, "emails") == []
    assert time.perf_counter() - start < 20, "minutes, where the time goes by the square"
    assert found("連" * 100 + "ann@mail.example.org", "emails")[0].endswith("ann@mail.example.org")


def test_known_keys_and_own_expressions_are_found():
    """Prevents an access key that is let through because it has no digits, and a user's pattern that is ignored."""
    assert "hf_" + "a" * 20 in found("use hf_" + "a" * 20 + " now", "ids")
    assert found("ward 7B and ward 8C", r"ward \w+") == ["ward 7B", "ward 8C"]


@pytest.mark.parametrize(
    ("patterns", "min_digits", "words"),
    [
        ([], 4, "expected a list of names (emails, numbers, ids)"),
        ("emails", 4, "expected a list of names"),
        (["["], 4, "neither a name (emails, numbers, ids) nor a regular expression"),
        (["x*"], 4, "finds the empty text"),
        (None, 0, "min_digits is 0; expected a whole number"),
    ],
)
def test_wrong_patterns_are_refused_at_once(patterns, min_digits, words):
    """Prevents a run of hours that hid nothing because of a slip in a pattern."""
    with pytest.raises(ValueError, match=re.escape(words)):
        PrivateTokens(patterns=patterns, min_digits=min_digits)


@pytest.mark.parametrize("text", ["Answer: 4821 walked", "naïve 日本語 4821 🦊🦊 x", " two  spaces\n\n4821"])
def test_tokens_are_placed_in_their_text(text):
    """Prevents scores that are shifted against their tokens behind a character of several tokens."""
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole, places = placed(tokenizer, ids)
    assert whole == text and len(places) == len(ids)
    assert places[0][0] == 0 and places[-1][1] == len(text)
    assert all(a <= b for (a, _), (b, _) in zip(places, places[1:], strict=False))
    marked = SpanScorer(tokenizer, pattern_finder(["numbers"])).scores(ids)
    pieces = [text[start:end] for (start, end), score in zip(places, marked, strict=True) if score]
    assert "".join(pieces).strip() == "4821"


class Metaspace:
    """A tokenizer that drops the space before whatever it decodes first, as sentencepiece's do."""

    WORDS = ["▁pin", "▁12", "▁34", "▁or"]

    def decode(self, ids, **_):
        return "".join(self.WORDS[one] for one in ids).replace("▁", " ").removeprefix(" ")


def test_a_dropped_leading_space_is_kept_between_tokens():
    """Prevents two short numbers that grow together to a secret because each token was decoded by itself."""
    text, places = placed(Metaspace(), [0, 1, 2, 3])
    assert text == "pin 12 34 or" and [text[start:end] for start, end in places] == ["pin", " 12", " 34", " or"]


def test_a_function_of_ones_own_gives_spans_with_scores():
    """Prevents a callable's scores from being rounded to yes and no, and overlapping spans from being summed."""
    tokenizer = make_tokenizer()
    ids = tokenizer("go walk", add_special_tokens=False)["input_ids"]
    _, places = placed(tokenizer, ids)
    scores = SpanScorer(tokenizer, lambda text: [(0, 2, 0.25), (0, 7, 0.5), (3, 7)]).scores(ids)
    assert [score for score, (start, _) in zip(scores, places, strict=True) if start < 2] == [0.5] * sum(
        start < 2 for start, _ in places
    )
    assert scores[-1] == 1.0 and min(scores) == 0.5


@pytest.mark.parametrize("span", [(0, 2, 1.5), (0, 2, float("nan")), (3, 1), "ab", (0,), None])
def test_a_function_that_gives_something_else_is_named(span):
    """Prevents a score of 2, which would turn the sign of a text's loss, from being taken."""

    def mine(text):
        return [span]

    with pytest.raises(ValueError, match=r"mine gives the span .*expected \(start, end\)"):
        SpanScorer(make_tokenizer(), mine).scores(make_tokenizer()("go walk")["input_ids"])


def test_rarity_is_linear_in_the_logarithm_of_the_frequency():
    """Prevents a rarity in the wrong direction, or one that leaves 0 to 1."""
    scorer = RarityScorer({1: 9000, 2: 900, 3: 90, 4: 10}, common=0.1, rare=0.001)
    scores = scorer.scores([1, 2, 3, 4, 77])
    assert scores == pytest.approx([0.0, 0.0228787, 0.5228787, 1.0, 1.0], abs=1e-6)
    for common, rare in ((0.001, 0.1), (2.0, 0.1), (0.1, 0.0)):
        with pytest.raises(ValueError, match="0 < rare < common <= 1"):
            PrivateTokens(scorer="rarity", common=common, rare=rare)
    with pytest.raises(ValueError, match="No token was counted"):
        RarityScorer({})


def test_rarity_is_refused_where_too_little_was_counted(tmp_path):
    """Prevents a small set in which the rarest token, and one never seen, score 0 without a word."""
    with pytest.raises(
        ValueError, match=r"900 tokens were counted.*Set rare to 1\.2e-03 or more and common well above"
    ):
        RarityScorer(dict.fromkeys(range(900), 1))
    assert RarityScorer(dict.fromkeys(range(900), 1), common=0.1, rare=1.2e-3).scores([5, 9999]) == [1.0, 1.0]
    assert RarityScorer({1: 99_999, 2: 1}).scores([2]) == [1.0], "the defaults, with just enough"
    with pytest.raises(ValueError, match="none is rarer than 1 in"):
        revised(tmp_path, reviser=PrivateTokens("rarity"))


@pytest.mark.parametrize("scorer", ["pattern", 3, "a:b:c", None])
def test_an_unknown_scorer_is_refused(scorer):
    """Prevents a slip in the name from being found after the models were loaded."""
    with pytest.raises(ValueError, match="expected patterns, rarity, or package.module:function"):
        PrivateTokens(scorer=scorer)
    with pytest.raises(ValueError, match="patterns is given"):
        PrivateTokens(scorer="rarity", patterns=["emails"])


# ------------------------------------------------------------------------------------------------- in a training


SECRET = [{"prompt": word["prompt"], "completion": f"{word['completion']} 4821 ok"} for word in ROWS]


def revised(folder, rows=SECRET, reviser=None, **overrides):
    """A trainer with the reviser, and two batches as it leaves them."""
    trainer = make_trainer(folder, rows=rows, **overrides)
    reviser = reviser or PrivateTokens()
    reviser.attach(trainer)
    trainer.revisers = [reviser]
    loader = iter(trainer.get_train_dataloader())
    batches = [next(loader), next(loader)]
    return trainer, reviser, batches, reviser.revise(batches, 0)


def test_scores_lie_on_the_tokens_that_they_are_of(tmp_path):
    """Prevents marks that are a position off: then the token beside the secret is hidden and the secret learned."""
    trainer, reviser, before, after = revised(tmp_path)
    for old, new in zip(before, after, strict=True):
        assert new.keys() - old.keys() == {"private"} and "private" not in old
        assert all(new[key] is old[key] for key in old)
        assert new["private"].shape == old["labels"].shape
        batch = Batch.from_inputs(new)
        assert ((batch.private == 0) | (batch.private == 1)).all()
        text = trainer.processing_class.decode(batch.student.targets[batch.private > 0])
        assert text.split() == ["4821"] * len(old["labels"]) or text.replace(" ", "") == "4821" * len(old["labels"])
        assert not new["private"][old["labels"] == IGNORE].any()
    share, tokens = reviser.figures()["private/share"]
    assert 0 < share < tokens == sum(int((one["labels"][:, 1:] != IGNORE).sum()) for one in before)


def test_the_higher_of_two_scores_counts(tmp_path):
    """Prevents a second scorer that uncovers what the first one hid."""
    _, _, batches, once = revised(tmp_path)
    _, other, _, _ = revised(tmp_path, reviser=PrivateTokens(scorer=lambda text: [(0, 1, 0.5)]))
    for first, second in zip(once, other.revise(once, 0), strict=True):
        assert (second["private"] >= first["private"]).all() and (second["private"] == 0.5).any()


def test_rarity_counts_the_training_rows(tmp_path):
    """Prevents frequencies of something else than the run's own texts."""
    rows = [{"prompt": "go", "completion": "walked" if place else "quick"} for place in range(16)]
    trainer, _, batches, after = revised(tmp_path, rows, PrivateTokens("rarity", common=0.04, rare=0.01))
    hidden = {int(one) for new in after for one in new["labels"][new["private"] > 0]}
    text = trainer.processing_class.decode(sorted(hidden))
    assert hidden and set(text.replace(" ", "")) <= set("quick")


def test_rarity_counts_all_that_is_read(tmp_path):
    """Prevents a token that every prompt has from being called rare, and padding marks from being counted as text."""
    trainer, reviser, _, _ = revised(tmp_path, reviser=PrivateTokens("rarity", common=0.04, rare=0.01))
    dataset = trainer.train_dataset
    expected = Counter(one for place in range(len(dataset)) for one in dataset[place]["student"]["input_ids"])
    assert reviser.scorer.counts == expected and IGNORE not in reviser.scorer.counts


def test_the_first_position_is_never_scored():
    """Prevents a token that nobody predicts from counting in the share, and in whether all are marked."""
    reviser = PrivateTokens(scorer=lambda text: [(0, len(text), 0.5)])
    counting(reviser, "walked", 0)
    ids = make_tokenizer()("walked 4821")["input_ids"]
    (batch,) = reviser.revise([{"labels": torch.tensor([ids])}], 0)
    assert batch["private"].tolist() == [[0.0, *[0.5] * (len(ids) - 1)]]
    assert reviser.figures()["private/share"] == (0.5 * (len(ids) - 1), float(len(ids) - 1))


def test_all_zero_marks_leave_the_run_as_it_was(tmp_path):
    """Prevents a reviser that finds nothing from changing a single bit of what is learned."""
    weights = []
    for reviser in (None, PrivateTokens(), PrivateTokens("patterns", ["emails"])):
        rows = ROWS[:16] if len(weights) < 2 else SECRET[:16]
        trainer = make_trainer(tmp_path, rows=rows, objective=["swing" if reviser else "forward_kl", "cross_entropy"])
        trainer.revisers = [reviser] if reviser else []
        for one in trainer.revisers:
            one.attach(trainer)
        before = trained_weights(trainer)
        trainer.train()
        weights.append(trained_weights(trainer))
        assert any(not torch.equal(value, before[name]) for name, value in weights[-1].items())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0]), "guard: other rows differ"


def test_the_text_of_a_private_token_is_not_learned(tmp_path):
    """Prevents the label from telling what the teacher's word no longer tells."""

    def word(completion):
        rows = [{"prompt": one["prompt"], "completion": f"is {completion}"} for one in ROWS]
        trainer = make_trainer(tmp_path, rows=rows, teacher=None, objective="cross_entropy", demonstrations=[])
        reviser = PrivateTokens(patterns=["numbers"])
        reviser.attach(trainer)
        trainer.revisers = [reviser]
        batch = reviser.revise([next(iter(trainer.get_train_dataloader()))], 0)[0]
        hidden, shown = (
            trainer.objective_sum(trainer.model, Batch.from_inputs(one)).total
            for one in (batch, {key: value for key, value in batch.items() if key != "private"})
        )
        return float(hidden.detach()), float(shown.detach())

    (hidden, shown), (public, same) = word("48213"), word("often")
    assert hidden < shown and public == same


def test_the_share_is_in_the_log(tmp_path):
    """Prevents a user who can't see whether anything was hidden."""
    trainer = make_trainer(tmp_path, rows=SECRET, objective="swing")
    trainer.revisers = [PrivateTokens()]
    trainer.revisers[0].attach(trainer)
    trainer.train()
    shares = [line["private/share"] for line in trainer.state.log_history if "private/share" in line]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)


# ---------------------------------------------------------------------------------------------------- bad scorers


@pytest.mark.parametrize("score", [1.0, 0.99, 0.6])
def test_a_scorer_that_marks_every_example_is_refused_before_training(tmp_path, score):
    """Prevents a run in which nothing of the teacher is learned and the log looks healthy."""
    with pytest.raises(ValueError, match="marks all .* tokens of the examples that were looked at as private"):
        revised(tmp_path, reviser=PrivateTokens(scorer=lambda text: [(0, len(text), score)]))
    revised(tmp_path, reviser=PrivateTokens(scorer=lambda text: [(0, len(text), 0.5)]))


def counting(reviser: PrivateTokens, text: str, steps: int) -> None:
    """Steps of one row each, without a trainer."""
    tokenizer = make_tokenizer()
    reviser.trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")))
    reviser.scorer = SpanScorer(tokenizer, reviser._find)
    labels = torch.tensor([[IGNORE, *tokenizer(text)["input_ids"]]])
    for step in range(steps):
        reviser.revise([{"labels": labels}], step)


@pytest.mark.parametrize("score", [1.0, 0.99])
def test_a_scorer_that_marks_every_token_for_some_steps_is_refused(score):
    """Prevents the same where the text is written in training and can't be looked at before."""
    reviser = PrivateTokens(scorer=lambda text: [(0, len(text), score)] if "4821" in text else [])
    counting(reviser, "4821", ALL_MARKED_STEPS - 1)
    counting(reviser, "walked", 1)
    counting(reviser, "4821", ALL_MARKED_STEPS - 1)
    with pytest.raises(ValueError, match=f"every token of {ALL_MARKED_STEPS} steps"):
        counting(reviser, "4821", 1)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_scorer_that_marks_nothing_is_warned_of_once(caplog, resumed):
    """Prevents a run that was thought to hide something; also where it was interrupted on the way."""
    reviser = PrivateTokens()
    with caplog.at_level(logging.WARNING):
        counting(reviser, "walked", NONE_MARKED_STEPS - 1)
        assert not caplog.records
        if resumed:
            state, reviser = reviser.state_dict(), PrivateTokens()
            reviser.load_state_dict(state)
        counting(reviser, "walked", 5)
    assert [record.message.count("no token in 50 steps") for record in caplog.records] == [1]
    caplog.clear()
    other = PrivateTokens()
    with caplog.at_level(logging.WARNING):
        counting(other, "walked 4821", 1)
        counting(other, "walked", NONE_MARKED_STEPS)
    assert not caplog.records


def test_what_a_scorer_needs_is_asked_for(tmp_path):
    """Prevents a failure at the first step, in words of a library."""
    trainer = make_trainer(tmp_path)
    trainer.processing_class = None
    with pytest.raises(ValueError, match="no tokenizer"):
        PrivateTokens().attach(trainer)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="train_dataset is missing"):
        PrivateTokens("rarity").attach(trainer)
    with pytest.raises(ValueError, match=r"no_such_module_x can't be imported"):
        PrivateTokens("no_such_module_x:f").attach(make_trainer(tmp_path))


FOLDER = Path(__file__).parent.parent / "recipes" / "which_tokens"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("loss.terms=[{kind: forward_kl}]", "private marks tokens, and no term heeds the marks (forward_kl)"),
        ("loss.terms=[{kind: forward_kl}, {kind: hidden_mse}]", "no term heeds the marks (forward_kl, hidden_mse)"),
        ("data.revise=[{kind: teacher_quality}]", "data.revise marks none; add {kind: private}"),
    ],
)
def test_marks_without_a_term_that_heeds_them_are_refused(change, words):
    """Prevents a run that is told to hide, hides nothing, and whose card says that it hid."""
    with pytest.raises(RecipeError, match=re.escape(words)):
        load_recipe(FOLDER / "swing.yaml", [change])


@pytest.mark.parametrize(
    "change",
    [
        "loss.terms=[{kind: forward_kl}, {kind: cross_entropy}]",
        "loss.terms=[{kind: 'my_losses:Mine'}]",
        "data.revise=[{kind: 'my_revisers:Mine'}]",
    ],
)
def test_marks_that_may_be_heeded_are_taken(change):
    """Prevents a refusal of what does hide, and of code that only its author knows."""
    load_recipe(FOLDER / "swing.yaml", [change])


def test_the_card_names_the_terms_that_hide_and_those_that_do_not():
    """Prevents a card that promises hiding for a term which learned private tokens like all others."""

    def said(*kinds):
        terms = [{"kind": kind, "weight": 1.0} for kind in kinds]
        return " ".join(limits({"recipe": {"data": {"revise": [{"kind": "private"}]}, "loss": {"terms": terms}}}, {}))

    both = said("swing", "forward_kl", "cross_entropy")
    assert (
        "less was learned by swing, cross_entropy." in both
        and "like all others, as far as is known, by forward_kl." in both
    )
    assert "like all others" not in said("swing")
    assert "no known term learned less" in said("forward_kl") and "less was learned by" not in said("forward_kl")
    assert "private" not in " ".join(limits({"recipe": {"loss": {"terms": [{"kind": "swing"}]}}}, {}))
    heeding = {kind for kind, loss in LOSSES.items() if kind == "swing" or loss.fits_text or not loss.needs}
    assert set(_HEEDING) == heeding


def test_it_is_in_the_table():
    """Prevents a recipe key that leads nowhere."""
    assert REVISERS["private"] == f"{PrivateTokens.__module__}:{PrivateTokens.__name__}"
    assert list(PATTERNS) == ["emails", "numbers", "ids"]
