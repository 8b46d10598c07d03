"""The student's own texts, corrected where they are worst and written on."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from deciding import batch_of, fake_trainer, figures, log, make_trainer, trained
from test_writer import Scripted, always, ending_in

from hfkd.batch import Batch
from hfkd.reading import read_batch
from hfkd.revision import REVISERS, correction
from hfkd.revision.correction import Correction, worst_place
from hfkd.revision.select import Selection
from hfkd.rollout import Completion, GenerationSettings, HFRollout, Mixture

END = 2


class Noting(Scripted):
    """As `Scripted`; notes how much could be written, too."""

    limits: list[int]

    def generate(self, model, prompts, description=None):
        """See `Rollout.generate`."""
        self.limits = [*getattr(self, "limits", []), self.settings.max_new_tokens]
        return super().generate(model, prompts, description)


@pytest.fixture
def correct(monkeypatch):
    """Correct these answers, of which student and teacher say so much; the new batch, and the reviser."""

    def corrected(answers, *said, rollout, times=1, step=4, like=None, **settings):
        told = iter(said)
        monkeypatch.setattr(correction, "read_batch", lambda trainer, inputs: next(told))

        @contextmanager
        def student():
            yield SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=END))

        rollout.settings = GenerationSettings(**{"max_new_tokens": 6, **settings})
        writer = SimpleNamespace(rollout=rollout, mixture=Mixture.of("student"), pad_id=END)
        trainer = fake_trainer(writer=writer, processing_class=make_tokenizer(), _student=student)
        trainer.revisers = [Correction(times)]
        trainer.revisers[0].attach(trainer)
        (batch,) = trainer.revisers[0].revise([{**(like or batch_of(answers)), "own_text": True}], step)
        return batch, trainer.revisers[0]

    return corrected


def answers_of(batch: dict, view: str = "") -> list[list[int]]:
    """What each row of a view learns."""
    return [[token for token in row if token != -100] for row in batch[f"{view}labels"].tolist()]


def test_one_token_is_corrected_and_the_rest_written_anew(correct):
    """A changed prefix is a text that nobody wrote; an old end behind a new token is one that nobody would."""
    rollout = Noting(lambda prompt: Completion([40, 41], "", False))
    said = figures(
        [0, 0, 0, 0, 1, 1],
        target=[10, 11, 12, 13, 20, 21],
        teacher={"top": [10, 11, 12, 30, 20, 21]},
        divergence=[9.0, 9.0, 9.0, 0.1, 5.0, 5.0],
    )
    batch, reviser = correct([[10, 11, 12, 13], [20, 21]], said, rollout=rollout)
    assert rollout.calls == [[[9, 9, 10, 11, 12, 30]]] and rollout.limits == [2], "one row, and what is left of 6"
    assert answers_of(batch) == answers_of(batch, "teacher_") == [[10, 11, 12, 30, 40, 41], [20, 21]]
    assert batch["own_text"] is True
    assert Batch.from_inputs(batch).student.targets.tolist() == [10, 11, 12, 30, 40, 41, 20, 21]
    assert reviser.figures() == {"correction/corrected": (1.0, 2.0), "correction/place": (3.0, 1.0)}


def test_the_worst_of_the_wrong_tokens_is_taken():
    """The largest divergence may lie where both say the same: then nothing would be corrected by the correction."""
    wrong = {"target": [1, 2, 3, 4], "teacher": {"top": [1, 9, 9, 9]}}
    assert worst_place(figures([0] * 4, divergence=[8.0, 0.5, 2.0, 1.0], **wrong)) == 2
    assert worst_place(figures([0] * 4, divergence=[8.0, 0.0, 0.0, 0.0], **wrong)) == 1, "the first of several"
    assert worst_place(figures([0] * 2, target=[1, 2], teacher={"top": [1, 2]}, divergence=[3.0, 4.0])) is None
    assert worst_place(figures([])) is None
    both = replace(
        figures([0] * 4, divergence=[8.0, 0.5, 2.0, 1.0], **wrong), reverse_kl=np.array([0.0, 9.0, 1.0, 0.0])
    )
    assert worst_place(both) == 2, "by KL(teacher || student), not the other one"


def test_a_text_that_the_teacher_agrees_with_stays_the_same_batch(correct):
    """Where no token is wrong the paper's argmax runs over nothing: token 0 would be replaced by itself."""
    rollout = Noting(lambda prompt: Completion([40], "", False))
    said = figures([0, 0], target=[10, 11], teacher={"top": [10, 11]}, divergence=[1.0, 2.0])
    batch, reviser = correct([[10, 11]], said, rollout=rollout)
    assert answers_of(batch) == [[10, 11]] and rollout.calls == [[]], "asked for nothing, as other processes may ask"
    assert reviser.figures()["correction/corrected"] == (0.0, 1.0)


@pytest.mark.parametrize("ending", ["end", "stop", "limit"])
def test_a_corrected_token_may_be_the_last(correct, ending):
    """Text behind an end is never read again, and a longer one than allowed may not fit into the model."""
    newline = make_tokenizer()("\n")["input_ids"][0]
    last = {"end": END, "stop": newline, "limit": 30}[ending]
    settings = {"max_new_tokens": 2} if ending == "limit" else {"stop": ("\n",)}
    said = figures([0] * 3, target=[10, 11, 12], teacher={"top": [10, last, 12]}, divergence=[1.0] * 3)
    rollout = Noting(lambda prompt: Completion([40], "", False))
    batch, _ = correct([[10, 11, 12]], said, rollout=rollout, **settings)
    assert answers_of(batch) == [[10, last]] and rollout.calls == [[]]


def test_the_new_end_is_cut_where_the_text_ends(correct):
    """A stop string that begins before the correction is seen by nobody who looks at the new tokens alone."""
    tokenizer = make_tokenizer()
    a, b = (tokenizer(letter)["input_ids"][0] for letter in "qz")
    said = figures([0] * 2, target=[10, 11], teacher={"top": [10, a]}, divergence=[1.0] * 2)
    rollout = Noting(lambda prompt: Completion([b, 50, 51, 52, 53, 54], "", False))
    batch, _ = correct([[10, 11]], said, rollout=rollout, stop=("qz",))
    assert answers_of(batch) == [[10, a, b]]
    batch, _ = correct([[10, 11]], said, rollout=rollout)
    assert answers_of(batch) == [[10, a, b, 50, 51, 52]], "no longer than six tokens"


def test_several_corrections_one_after_the_other(correct):
    """The second looks at the text that the first has made."""
    first = figures([0] * 2, target=[10, 11], teacher={"top": [10, 30]}, divergence=[1.0] * 2)
    second = figures([0] * 3, target=[10, 30, 40], teacher={"top": [10, 30, 31]}, divergence=[1.0] * 3)
    rollout = Noting(lambda prompt: Completion([40 + len(prompt) - 4], "", False))
    batch, reviser = correct([[10, 11]], first, second, rollout=rollout, times=2)
    assert answers_of(batch) == [[10, 30, 31, 41]]
    assert reviser.figures() == {"correction/corrected": (2.0, 2.0), "correction/place": (3.0, 2.0)}


def test_each_step_draws_samples_of_its_own(correct):
    """The same draws at each step would lead the student down the same way for ever."""
    seeds = []
    for step in (4, 5, 4):
        said = figures([0] * 2, target=[10, 11], teacher={"top": [10, 30]}, divergence=[1.0] * 2)
        rollout = Noting(lambda prompt: Completion([40], "", False))
        correct([[10, 11]], said, rollout=rollout, step=step)
        seeds += rollout.seeds
    assert seeds[0] == seeds[2] != seeds[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_stays_padded_where_it_was(correct, side):
    """A model with a cache of left-padded rows, or one that counts places from the left, reads another text else."""
    like = batch_of([[10, 11, 12], [20]])
    if side == "left":
        like = {name: torch.stack([rows[0], rows[1].roll(2)]) for name, rows in like.items()}
    said = figures([0] * 3 + [1], target=[10, 11, 12, 20], teacher={"top": [10, 30, 12, 20]}, divergence=[1.0] * 4)
    rollout = Noting(lambda prompt: Completion([40, 41, 42], "", False))
    batch, _ = correct([], said, rollout=rollout, like=like)
    assert answers_of(batch) == answers_of(batch, "teacher_") == [[10, 30, 40, 41, 42], [20]]
    gap, text = [0] * 4, [1] * 3
    assert batch["attention_mask"][1].tolist() == (gap + text if side == "left" else text + gap)


@pytest.mark.parametrize(("tokens", "fits"), [(1989, False), (1020, False), (1019, True)])
def test_texts_that_are_written_on_together_fit(tmp_path, tokenizer, tokens, fits):
    """A run in which each text fits by itself would end in the middle, by what happens to be sampled."""
    rollout = HFRollout(tokenizer, GenerationSettings(max_new_tokens=tokens, temperature=1.0))
    own = {"answer": "student", "objective": "reverse_kl", "rollout": rollout}
    trainer = make_trainer(tmp_path, **own)
    longest = trainer.train_dataset.longest_prompts["student"]
    assert longest + 1989 <= 2048 and (longest + 2 * (tokens - 1) <= 2048) == fits
    if fits:
        make_trainer(tmp_path, [Correction()], **own)
        return
    with pytest.raises(
        ValueError, match=r"correct: .* above the 2048 of the student\. Lower max_new_tokens to at most 1019"
    ):
        make_trainer(tmp_path, [Correction()], **own)


def test_in_a_run_the_teacher_would_have_said_so(tmp_path, tokenizer):
    """What is learned must be the student's own text with the teacher's word in it, by the present weights."""
    rollout = HFRollout(tokenizer, GenerationSettings(max_new_tokens=8, stop=("\n",)))
    options = {"answer": "student", "objective": "reverse_kl", "max_steps": 1, "rollout": rollout}
    trainer, seen = make_trainer(tmp_path, [Correction()], **options), []
    revise = trainer.revisers[0].revise

    def noting(batches, step):
        before = [read_batch(trainer, each) for each in batches]
        new = revise(batches, step)
        seen.extend(zip(before, [read_batch(trainer, each) for each in new], strict=True))
        return new

    trainer.revisers[0].revise = noting
    trained(trainer)
    ((before, after),) = seen
    changed = 0
    for row in range(8):
        old, new = (each.select(each.text == row) for each in (before, after))
        place = worst_place(old)
        if place is None:
            assert old.target.tolist() == new.target.tolist()
            continue
        changed += 1
        assert new.target[:place].tolist() == old.target[:place].tolist()
        assert new.target[place] == old.teacher.top[place] == new.teacher.top[place]
        assert new.target[place + 1 :].tolist() == new.student.top[place + 1 :].tolist(), "greedily, by the student"
        assert len(new) <= 8
    assert changed == log(trainer, "correction/corrected")[0] * 8 > 0


def test_other_texts_are_not_touched(tmp_path):
    """In a mixture the data set's steps have gold texts: nothing of them may be overwritten."""
    mixed = {"answer": {"student": 0.7, "dataset": 0.3}, "objective": "reverse_kl", "max_steps": 6, "seed": 17}
    trainer = make_trainer(tmp_path, [Correction()], rollout=ending_in(), **mixed)
    revise, same = trainer.revisers[0].revise, []

    def noting(batches, step):
        new = revise(batches, step)
        same.append((bool(batches[0].get("own_text")), new[0] is batches[0]))
        return new

    trainer.revisers[0].revise = noting
    trained(trainer)
    assert {untouched for own, untouched in same if not own} == {True}
    assert len(log(trainer, "correction/corrected")) == sum(own for own, _ in same) in range(1, 6)


def test_without_it_own_text_trains_as_before(tmp_path):
    """A reviser that is there and corrects nothing must leave every bit of the update alone."""

    class Agreeing(Correction):
        def _draft(self, text, said, ends):
            return super()._draft(text, said.select(said.target != said.target), ends)

        def _drafts(self, batch, said, ends):
            return [correction.Draft(each.text) for each in super()._drafts(batch, said, ends)]

    own = {"answer": "student", "objective": "reverse_kl"}
    plain = trained(make_trainer(tmp_path / "a", rollout=ending_in(), **own))
    same = trained(make_trainer(tmp_path / "b", [Agreeing()], rollout=ending_in(), **own))
    changed = trained(make_trainer(tmp_path / "c", [Correction()], rollout=ending_in(), **own))
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not all(torch.equal(plain[name], changed[name]) for name in plain)


def test_what_does_not_fit_is_said_at_once(tmp_path):
    """Without own texts nothing is ever corrected; and what was decided of a text doesn't hold for another one."""
    for times in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"times is {times}; expected a number of corrections"):
            Correction(times)
    with pytest.raises(ValueError, match="the student writes nothing"):
        make_trainer(tmp_path, [Correction()])
    with pytest.raises(ValueError, match="the student writes nothing"):
        make_trainer(tmp_path, [Correction()], answer="teacher", rollout=always([5], "a"))
    with pytest.raises(ValueError, match="there is no teacher"):
        Correction().attach(fake_trainer(teacher=None))
    own = {"answer": "student", "objective": "reverse_kl", "rollout": ending_in()}
    with pytest.raises(ValueError, match="Selection comes before it"):
        make_trainer(tmp_path, [Selection(), Correction()], **own)
    make_trainer(tmp_path, [Correction(), Correction(), Selection()], **own)
    assert REVISERS["correct"] == f"{Correction.__module__}:{Correction.__name__}"
