"""The domain sampler: its arithmetic, what it draws, what it measures, and that a run that goes on draws the same."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from rich.console import Console
from training import ROWS, WORDS, lora, make_trainer, trained_weights

from hfkd import DistillationTrainer, EmaTeacher, HFRollout, LocalTeacher, PromptStyle
from hfkd.data.prompts import PromptBuilder
from hfkd.data.views import DistillationDataset
from hfkd.recipe import RecipeError, load_recipe
from hfkd.rollout import GenerationSettings
from hfkd.run import run_recipe
from hfkd.sampling.course import Course, cycle
from hfkd.sampling.domains import DomainSampler, next_shares, stays
from hfkd.teachers import Teacher

RECIPE = Path(__file__).parents[1] / "recipes" / "which_data" / "domains.yaml"
SPOKEN = [{"prompt": word, "completion": f"{word}ed", "domain": "past"} for word in WORDS[:12]]
COUNTED = [{"prompt": f"{word} {word}", "completion": "2", "domain": "count"} for word in WORDS[:9]]
MIXED = [*SPOKEN, *COUNTED]


def dataset(rows: list[dict] = MIXED) -> DistillationDataset:
    return DistillationDataset(rows, PromptBuilder(make_tokenizer(), PromptStyle()))


def attached(rows: list[dict] = MIXED, **options: Any) -> DomainSampler:
    sampler = DomainSampler(**{"examples": 2, **options})
    sampler.attach(dataset(rows), seed=3, examples_per_step=4)
    return sampler


def trainer_of(folder: Path, sampler: DomainSampler | None = None, **options: Any) -> DistillationTrainer:
    """A student beside a fixed teacher, four rows a step, four steps an epoch (17 rows are drawn)."""
    sampler = DomainSampler(examples=2, interval=2) if sampler is None else sampler
    settings = {"teacher": LocalTeacher(make_model(seed=1)), "demonstrations": (), "per_device_train_batch_size": 4}
    return make_trainer(folder, rows=MIXED, sampler=sampler, **{**settings, "learning_rate": 1e-2, **options})


# --- arithmetic


def test_the_shares_of_three_domains() -> None:
    """Ratios of losses instead of perplexities, or a smoothing at the wrong end, teach another mix."""
    first = next_shares([1 / 3] * 3, [12 / 8, 6 / 5, 20 / 10], smoothing=0.0)
    assert first == pytest.approx([0.295025, 0.218560, 0.486415], abs=1e-6)
    second = next_shares(first, [11 / 8, 5.8 / 5, 16 / 10], smoothing=0.5)
    assert second == pytest.approx([0.303195, 0.248243, 0.448562], abs=1e-6) and sum(second) == pytest.approx(1)


def test_no_domain_is_lost_or_takes_all() -> None:
    """exp of a weak student's ratio is infinite, and a share of 0 could never come back."""
    shares = next_shares([0.2, 0.3, 0.5], [900.0, 1.0, 1e5], smoothing=0.3)
    assert shares == pytest.approx([0.1, 0.1, 0.8])
    alone = next_shares([0.5, 0.5], [1.0, 2000.0], smoothing=0.0)
    assert alone == pytest.approx([0.0, 1.0]) and all(map(math.isfinite, next_shares(alone, [9e4, 1.0], 0.0)))
    equal = [0.25] * 4
    for _ in range(5):
        equal = next_shares(equal, [1.0] * 4, smoothing=0.5)
    assert equal == pytest.approx([0.25] * 4)


def test_a_course_knows_what_counts_where() -> None:
    """A decision that counts one draw too early or is lost at an epoch's end changes the rows of a resumed run."""
    course, old, new = Course(), torch.tensor([1.0]), torch.tensor([2.0, 3.0])
    assert course.at(5, 9) is None
    course.record(0, 8, old)
    course.record(0, 20, new)  # beyond the epoch's end
    assert course.at(0, 7) is None and course.at(0, 8) is old and course.at(0, 19) is old and course.at(1, 0) is new
    again = Course()
    again.load_state_dict(course.state_dict())
    assert again.at(0, 12).equal(old) and again.at(3, 1).equal(new)
    course.record(1, 4, old)
    assert course.at(1, 3) is new and len(course.state_dict()["places"]) == 2  # what epoch 0 drew by is forgotten
    with pytest.raises(ValueError, match="later place"):
        course.record(0, 3, old)
    empty = Course()
    empty.load_state_dict(Course().state_dict())
    assert empty.at(0, 0) is None


def test_a_cycle_goes_through_all_before_any_comes_again() -> None:
    """Rows drawn with repetition leave a third of a domain unseen."""
    walk = cycle(range(7), "seed")
    rounds = [[next(walk) for _ in range(7)] for _ in range(3)]
    assert all(sorted(each) == list(range(7)) for each in rounds) and rounds[0] != rounds[1]


# --- what is drawn


def test_draws_follow_the_shares_from_their_place_on() -> None:
    """A sampler that logs shares and draws by others is a mix that nobody asked for."""
    rows = [{"prompt": f"{name} {n}", "completion": "x", "domain": name} for name in "abc" for n in range(1002)]
    sampler = attached(rows)
    shares = [0.6, 0.1, 0.3]
    sampler.course.record(0, 1500, torch.tensor(shares, dtype=torch.float64))
    drawn = [sampler.dataset.row(index)["domain"] for index in sampler.order(0)]
    assert len(drawn) == len(sampler) == 3000 and sampler.drawn == 3000
    for part, wanted in ((drawn[:1500], [1 / 3] * 3), (drawn[1500:], shares)):
        counts = Counter(part)
        for name, share in zip("abc", wanted, strict=True):
            assert abs(counts[name] - 1500 * share) < 3 * math.sqrt(1500 * share * (1 - share)), (name, counts)


def test_a_domain_that_runs_out_is_cycled() -> None:
    """A domain with a large share and few rows must neither end the epoch nor repeat one row."""
    sampler = attached()
    sampler.course.record(0, 0, torch.tensor([1.0, 0.0], dtype=torch.float64))  # `count`, 7 of 9 rows
    drawn = list(sampler.order(0))
    assert len(drawn) == 17 and sorted(drawn[:7]) == sorted(set(drawn)) and len(set(drawn)) == 7
    assert drawn[:7] != drawn[7:14] and sorted(drawn[:7]) == sorted(drawn[7:14])


def test_what_is_measured_is_never_drawn() -> None:
    """A perplexity on rows that are learned falls by memory; a second row of the same prompt would leak it."""
    doubled = [*MIXED, {**SPOKEN[0], "completion": "other"}, {**SPOKEN[3], "prompt": SPOKEN[3]["prompt"].upper()}]
    for seed in range(4):
        sampler = DomainSampler(examples=5)
        sampler.attach(dataset(doubled), seed=seed, examples_per_step=4)
        measured = {sampler.dataset.row(index)["prompt"].lower() for some in sampler.held_out for index in some}
        assert [len(some) for some in sampler.held_out] == [5, 5] and len(measured) == 10
        drawn = {sampler.dataset.row(index)["prompt"].lower() for epoch in range(9) for index in sampler.order(epoch)}
        assert not drawn & measured and len(drawn | measured) == 21


def test_what_is_measured_in_one_domain_is_drawn_in_no_other() -> None:
    """One set of questions in two styles of answer: a prompt that the other domain teaches is measured by memory."""
    asked = [f"question {number}" for number in range(16)]
    both = [{"prompt": text, "completion": name, "domain": name} for name in ("long", "short") for text in asked]
    for seed in range(4):
        sampler = DomainSampler(examples=3)
        sampler.attach(dataset(both), seed=seed, examples_per_step=4)
        measured = {sampler.dataset.row(index)["prompt"] for some in sampler.held_out for index in some}
        drawn = {sampler.dataset.row(index)["prompt"] for epoch in range(9) for index in sampler.order(epoch)}
        assert [len(some) for some in sampler.held_out] == [3, 3] and not drawn & measured
        assert len(sampler) == 2 * (16 - len(measured)) and len(drawn | measured) == 16
    hidden = [row for row in both if row["prompt"] in asked[:4]]
    with pytest.raises(ValueError, match="asks what other domains ask"):
        for seed in range(64):  # of 4 prompts 2 are set aside in each domain: the others, for some seed
            DomainSampler(examples=2).attach(dataset(hidden), seed=seed, examples_per_step=4)


def test_draws_are_a_function_of_seed_and_epoch() -> None:
    """Processes that draw differently learn a batch that nobody asked for; epochs that draw alike learn half."""
    first, second = attached(), attached()
    assert list(first.order(1)) == list(second.order(1)) != list(first.order(2))
    second.attach(dataset(), seed=4, examples_per_step=4)
    assert list(first.order(1)) != list(second.order(1))


# --- bad input


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS, "no 'domain', by which .*its columns: prompt, completion"),
        (SPOKEN, "'domain' has one value only, 'past'"),
        ([*MIXED, {**ROWS[16], "domain": " "}], "Row 21 has no 'domain'"),
        ([*MIXED, {**ROWS[16], "domain": "rare"}], "'rare' has 1 different prompts, and examples=2"),
    ],
)
def test_rows_without_domains_are_refused(tmp_path: Path, rows: list[dict], words: str) -> None:
    """A mix by a column that isn't there is no mix; found when the trainer is made, not after hours."""
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, rows=rows, sampler=DomainSampler(examples=2))


@pytest.mark.parametrize(
    "options",
    [{"interval": 0}, {"interval": 2.5}, {"examples": True}, {"smoothing": 1.0}, {"smoothing": -0.1}],
)
def test_numbers_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    """At smoothing 1 nothing would ever be chosen, with the cost of measuring it."""
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        DomainSampler(**options)


def test_nothing_to_measure_with_is_refused(tmp_path: Path) -> None:
    """Without a teacher there is no gap; on placeholders for texts yet to be written any gap is nonsense."""
    with pytest.raises(ValueError, match="asks the teacher"):
        trainer_of(tmp_path, teacher=None, objective="cross_entropy").train()
    rollout = HFRollout(make_tokenizer(), GenerationSettings(max_new_tokens=3))
    with pytest.raises(ValueError, match="written during training"):
        trainer_of(tmp_path, answer="student", rollout=rollout).train()


def test_recipes_are_held_against_the_constructor(tmp_path: Path) -> None:
    """A misspelt key that is passed over trains with the default."""
    assert load_recipe(RECIPE).data.sampler.kind == "domains"
    with pytest.raises(RecipeError, match=r"data.sampler.intervall.*interval"):
        load_recipe(RECIPE, ["data.sampler.intervall=5"])
    with pytest.raises(RecipeError, match="smoothing is 1.5"):
        load_recipe(RECIPE, ["data.sampler.smoothing=1.5"])


@pytest.mark.parametrize("answer", ["dataset", "teacher"])
def test_a_recipe_draws_by_a_column_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """A column that is lost on the way from the file, or while the teacher writes the answers, ends the run."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    rows = [{"prompt": row["prompt"], "completion": row["completion"], "kind": row["domain"]} for row in MIXED]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": "model", "lora": {"r": 2, "alpha": 4}},
        "teacher": {"kind": "self"},
        "data": {
            "train": {"path": "rows.jsonl", "columns": {"domain": "kind"}},
            "demonstrations": {"count": 2},
            "answer": answer,
            "generation": {"max_new_tokens": 3},
            "sampler": {"kind": "domains", "interval": 2, "examples": 2},
        },
        "training": {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "evaluation": None}))
    run_recipe(load_recipe("recipe.yaml"), console=Console(file=io.StringIO()))
    logged = next(Path("out").glob("checkpoint-*/trainer_state.json")).read_text()
    assert "domains/count/share" in logged and "domains/past/teacher_perplexity" in logged


# --- what is measured


def by_hand(model: torch.nn.Module, trainer: DistillationTrainer, examples: list[int]) -> float:
    """Perplexity over all answer tokens together, from the model's own logits, one text at a time."""
    losses, tokens = 0.0, 0
    for index in examples:
        view = trainer.train_dataset[index]["student"]
        ids, labels = torch.tensor([view["input_ids"]]), torch.tensor([view["labels"]])
        with torch.no_grad():
            log_probs = model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        learned = labels[0, 1:] != -100
        losses -= float(log_probs[learned].gather(-1, labels[0, 1:][learned, None]).sum())
        tokens += int(learned.sum())
    return math.exp(losses / tokens)


def test_the_perplexities_are_those_of_the_answers(tmp_path: Path) -> None:
    """Means of means over batches, or tokens of the prompt, would rank the domains in another order."""
    sampler = DomainSampler(examples=5, interval=2)
    trainer = trainer_of(tmp_path, sampler, learning_rate=0.0, per_device_eval_batch_size=3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "domains/past/share" in entry]
    assert len(entries) == 2 and [entry["step"] for entry in entries] == [1, 2]
    for number, name in enumerate(sampler.domains):
        for side, model in (("student", make_model(seed=0)), ("teacher", make_model(seed=1))):
            wanted = by_hand(model, trainer, sampler.held_out[number])
            assert entries[1][f"domains/{name}/{side}_perplexity"] == pytest.approx(wanted, rel=1e-5)
    ratios = [
        entries[1][f"domains/{n}/student_perplexity"] / entries[1][f"domains/{n}/teacher_perplexity"]
        for n in sampler.domains
    ]
    wanted = next_shares(next_shares([0.5, 0.5], ratios, 0.0), ratios, 0.5)
    assert [entries[0][f"domains/{name}/share"] for name in sampler.domains] == [0.5, 0.5]
    assert [entries[1][f"domains/{name}/share"] for name in sampler.domains] == pytest.approx(wanted)


def test_a_teacher_that_stays_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large teacher read at each measurement costs more than the student's training; one that moves must be."""
    asked: list[str] = []
    original = DomainSampler._perplexities

    def counted(self: DomainSampler, trainer: Any, side: str) -> Any:
        asked.append(side)
        return original(self, trainer, side)

    monkeypatch.setattr(DomainSampler, "_perplexities", counted)
    trainer_of(tmp_path, max_steps=4).train()
    assert asked == ["student", "teacher", "student", "student"]
    asked.clear()
    moving = {"teacher": EmaTeacher(decay=0.5), "peft_config": lora(), "objective": "forward_kl"}
    trainer_of(tmp_path, max_steps=2, demonstrations=[{"prompt": "x", "completion": "y"}], **moving).train()
    assert asked == ["student", "teacher"] * 2
    assert stays(LocalTeacher(make_model())) and not stays(EmaTeacher())


class Unsure(Teacher):
    """Knows the likeliest ids only."""

    def __init__(self) -> None:
        self.model = LocalTeacher(make_model(seed=1))

    def prepare(self, accelerator: Any, student: Any) -> None:
        """The model below."""
        self.model.prepare(accelerator, student)

    def signal(self, batch: Any, needs: Any) -> Any:
        """Its three likeliest ids."""
        from hfkd.rows import TopKRows
        from hfkd.signal import TeacherSignal

        rows = self.model.signal(batch, needs).rows
        logits = rows.logits(slice(None), torch.empty(len(rows), rows.vocab_size))
        values, ids = logits.log_softmax(-1).topk(3)
        return TeacherSignal(TopKRows(ids, values, rows.vocab_size))


def test_a_perplexity_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    """Shares made of NaN draw the first domain for ever."""
    with pytest.raises(ValueError, match=r"perplexity of the teacher in the domain 'count' is nan.*codec hidden"):
        trainer_of(tmp_path, teacher=Unsure()).train()


def test_measuring_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    """A measurement that draws random numbers, or leaves dropout off, makes another run of it."""
    found = []
    for interval in (1, 50):
        sampler = DomainSampler(examples=2, interval=interval)
        model = make_model(seed=0, attention_dropout=0.3)
        trainer = trainer_of(tmp_path, sampler, model=model, max_steps=2)
        trainer.train()
        found.append({**trained_weights(trainer), "random": torch.get_rng_state()})
        assert int(sampler.state_dict()["places"][:, 1].sum()) == (
            0 if interval == 50 else 12
        )  # counts from step 3 on
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


# --- going on


RESUMED = {
    "plain": {},
    "workers": {"dataloader_num_workers": 1},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_draws_the_same(tmp_path: Path, name: str) -> None:
    """Step 4 is inside the first epoch (17 rows, 5 steps), step 7 inside the second: shares that begin anew, or
    count from another row, teach other rows.
    """
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", **RESUMED[name]}

    def sampler() -> DomainSampler:
        return DomainSampler(examples=2, interval=1, smoothing=0.2)

    straight = trainer_of(tmp_path / "straight", whole := sampler(), **options)
    straight.train()
    assert len(whole.course.state_dict()["places"]) > 2 and abs(float(whole.shares[0]) - 0.5) > 0.02
    for step in (4, 7):
        folder = tmp_path / f"again-{step}"
        shutil.copytree(tmp_path / "straight" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = trainer_of(folder, resumed := sampler(), **options)
        again.train(resume_from_checkpoint=True)
        ours, theirs = trained_weights(straight), trained_weights(again)
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        assert all(value.equal(resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_other_settings_cannot_go_on(tmp_path: Path) -> None:
    """With another number of rows set aside the place in the data stands for other rows."""
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, **options).train()
    for changed in ({"examples": 3}, {"interval": 5}, {"smoothing": 0.4}):
        sampler = DomainSampler(**{"examples": 2, "interval": 2, **changed})
        with pytest.raises(ValueError, match=f"{next(iter(changed))} is .* the checkpoint was made with"):
            trainer_of(tmp_path, sampler, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
