"""The k-shot curve and the sample completions of a training: they are there, once a step, and the training doesn't
notice.
"""

from __future__ import annotations

import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from training import DEMONSTRATIONS, ROWS, lora, make_trainer, trained_weights
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from hfkd import LocalTeacher
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.eval.k_shot import evaluate_k_shot
from hfkd.eval.tracking import KShotCallback, Sample, sample_completions

ITEMS = [{"prompt": verb, "completion": f"{verb}ed"} for verb in ("hop", "nod", "rest", "sigh", "wait")]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ROWS[:4]}
FIELDS = ("standard_error", "most_frequent_share", "top_answer_share")


class Seen(TrainerCallback):
    """Keeps what a tracker would be sent."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note it with its step."""
        self.lines.append((state.global_step, dict(logs)))

    def curves(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, logs) for step, logs in self.lines if any("k_shot" in name for name in logs)]


class Board(TensorBoardCallback):
    """A TensorBoard that needs no package."""

    def __init__(self, fails: bool = False) -> None:
        self.texts: list[tuple[str, str, int]] = []
        self.fails, self.tb_writer = fails, self

    def add_text(self, tag: str, text: str, step: int) -> None:
        """As a writer's."""
        if self.fails:
            raise OSError("no space left, token=hf_abcdefghijkl")
        self.texts.append((tag, text, step))

    def flush(self) -> None:
        """As a writer's."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to open."""

    on_log = on_train_end = on_train_begin


def asking(**overrides: Any) -> KShotCallback:
    settings = {"shots": (0, 2), "max_new_tokens": 4, "samples": 2, **overrides}
    items = settings.pop("items", ITEMS)
    return KShotCallback(items, DEMONSTRATIONS, PromptBuilder(make_tokenizer(), PromptStyle()), **settings)


def test_the_curve_is_logged_at_every_evaluation(tmp_path):
    """A curve without a point at each evaluation, or with other figures than the model's, says nothing of it."""
    callback, seen = asking(), Seen()
    trainer = make_trainer(tmp_path, **EVALUATED, max_steps=3, callbacks=[callback, seen])
    trainer.train()
    curves = seen.curves()
    assert [step for step, _ in curves] == [1, 2, 3]
    own = evaluate_k_shot(
        trainer.model, callback.builder.tokenizer, ITEMS, DEMONSTRATIONS, callback.builder, shots=(0, 2),
        max_new_tokens=4,
    )  # fmt: skip
    wanted = {f"eval_k_shot_{k}": result.accuracy for k, result in own.results.items()}
    wanted |= {f"eval_k_shot_{k}_{f}": getattr(result, f) for k, result in own.results.items() for f in FIELDS}
    last = {name: value for name, value in curves[-1][1].items() if name != "epoch"}
    assert last == wanted
    assert all(step == entry["step"] for step, entry in zip((1, 2, 3), logged(trainer), strict=True))


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "eval_k_shot_0" in entry]


CASES = {
    "adapter with dropout": lambda: {"peft_config": lora(lora_dropout=0.3)},
    "full student": lambda: {
        "model": make_model(seed=0, attention_dropout=0.2, use_cache=False),
        "teacher": LocalTeacher(make_model(seed=1)),
    },
    "gradient checkpointing": lambda: {"peft_config": lora(lora_dropout=0.3), "gradient_checkpointing": True},
    "accumulation": lambda: {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "texts of its own": lambda: {"answer": "student", "objective": "reverse_kl"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_training_is_bitwise_the_same(tmp_path, name):
    """Random numbers that an evaluation uses up, a mode or a cache that stays switched: then whoever watches a
    training changes it.
    """

    def train(callbacks: list[TrainerCallback]) -> dict[str, torch.Tensor]:
        settings = {**CASES[name](), **EVALUATED, "max_steps": 3, "learning_rate": 0.05, "optim": "adamw_torch"}
        random.seed(4)
        np.random.seed(4)
        trainer = make_trainer(tmp_path, **settings, callbacks=callbacks)
        trainer.train()
        states = {"torch": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1])}
        states["numpy"] = torch.tensor(np.random.get_state()[1].astype("int64"))
        switches = [module.training for module in trainer.model.modules()]
        checkpointing = [getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()]
        states["switches"] = torch.tensor([*switches, *checkpointing, bool(trainer.model.config.use_cache)])
        return trained_weights(trainer) | states

    without, asked = train([]), train([asking()])
    assert without.keys() == asked.keys()
    assert [key for key in without if not torch.equal(without[key], asked[key])] == []


def test_the_random_numbers_of_a_users_own_builder_are_put_back(tmp_path):
    """A prompt that is drawn at random in an evaluation must not change what the next step draws."""

    def prompt(row, shown, privileged):
        torch.rand(3), random.random()
        return f"{row['prompt']} ->"

    builder = PromptBuilder(make_tokenizer(), PromptStyle(builder=prompt))
    callback = KShotCallback(ITEMS, DEMONSTRATIONS, builder, shots=(0,), max_new_tokens=2)
    trainer = make_trainer(tmp_path, eval_dataset=ROWS[:4], callbacks=[callback])
    before, python = torch.get_rng_state(), random.getstate()
    trainer.evaluate()
    assert torch.equal(before, torch.get_rng_state()) and python == random.getstate()


def test_once_a_step_with_several_sets(tmp_path, monkeypatch):
    """Trainer evaluates each named set by itself: asking for each would cost as many times as much."""
    asked = []
    monkeypatch.setattr(
        "hfkd.eval.tracking.evaluate_k_shot", lambda *a, **k: asked.append(1) or evaluate_k_shot(*a, **k)
    )
    seen = Seen()
    sets = {"eval_dataset": {"first": ROWS[:4], "second": ROWS[4:8]}, "eval_steps": 2}
    trainer = make_trainer(tmp_path, **{**EVALUATED, **sets}, callbacks=[asking(samples=0), seen])
    trainer.train()
    assert len(asked) == 1 and [step for step, _ in seen.curves()] == [2]
    asked.clear()
    trainer.train()  # a second training has steps of the same numbers
    assert len(asked) == 1


def test_an_evaluation_under_another_name_asks_nothing(tmp_path):
    """Figures of the training set under the names of the held-out curve would be a point of neither."""
    callback, seen = asking(), Seen()
    trainer = make_trainer(tmp_path, eval_dataset=ROWS[:4], callbacks=[callback, seen])
    trainer.evaluate(ROWS[:4], metric_key_prefix="seen")
    assert not seen.curves()
    assert trainer.evaluate()["eval_k_shot_0"] == seen.curves()[0][1]["eval_k_shot_0"]


def test_the_best_checkpoint_can_be_chosen_by_it(tmp_path):
    """Figures that come only after Trainer has looked for the best one can't be chosen by."""
    scores = iter([0.2, 0.8, 0.4, 0.6])
    callback = asking(samples=0)
    ask = callback._ask

    def scripted(trainer):
        report = ask(trainer)
        report.results[2].accuracy = next(scores)
        return report

    callback._ask = scripted
    saved = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    choice = {**saved, "metric_for_best_model": "k_shot_2", "max_steps": 5}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(tmp_path, **EVALUATED, **choice, learning_rate=0.01, callbacks=[callback, stop])
    trainer.train()
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == 0.8
    assert trainer.state.global_step == 4  # two evaluations that were no better


def test_a_resumed_run_has_the_same_curve(tmp_path):
    """A run that goes on must neither ask a step twice nor leave one out, and its weights are those of the straight
    one.
    """
    settings = {**EVALUATED, "optim": "adamw_torch", "learning_rate": 0.01, "peft_config": lora(lora_dropout=0.3)}
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
    straight = make_trainer(tmp_path / "a", **settings, **saved, callbacks=[asking()])
    straight.train()
    for folder in (tmp_path / "a").glob("checkpoint-4"):
        folder.rename(tmp_path / "gone")
    again = make_trainer(tmp_path / "a", **settings, **saved, callbacks=[asking()])
    again.train(resume_from_checkpoint=True)
    assert logged(again) == logged(straight) and [entry["step"] for entry in logged(again)] == [1, 2, 3, 4]
    kept = trained_weights(straight)
    assert all(torch.equal(kept[name], value) for name, value in trained_weights(again).items())


def test_the_time_is_no_part_of_the_speed(tmp_path, monkeypatch):
    """Seconds of asking in the tokens per second make a training look slower wherever it is watched more."""
    from hfkd.eval import tracking

    def slow(*args, **kwargs):
        clock[0] += 1000
        return evaluate_k_shot(*args, **kwargs)

    clock = [0.0]
    monkeypatch.setattr("hfkd.metrics.time.perf_counter", lambda: clock[0] + 1e-3 * next(ticks))
    ticks = iter(range(10**6))
    monkeypatch.setattr(tracking, "evaluate_k_shot", slow)
    trainer = make_trainer(tmp_path, **EVALUATED, callbacks=[asking()])
    trainer.train()
    speeds = [entry["speed/tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(speeds) == 2 and min(speeds) > 100  # with those seconds it would be less than one


def test_samples_reach_an_active_tracker(tmp_path):
    """A curve that rises while the student writes nonsense is seen only in what it wrote."""
    board, callback = Board(), asking(samples=2)
    trainer = make_trainer(tmp_path, **EVALUATED, max_steps=1, callbacks=[board, callback])
    trainer.train()
    ((tag, text, step),) = board.texts
    assert (tag, step) == ("eval/samples", 1)
    assert text.count("####") == 4 and text.count("#### 2 shots: wrong") == 2
    assert "    hop" in text and "    rest" in text and "    nod" not in text  # spread over the items
    assert "    gold: hoped" in text


def test_no_samples_and_no_tracker(tmp_path):
    """0 must mean none, and a board that isn't there must not be looked for."""
    board = Board()
    make_trainer(tmp_path, **EVALUATED, max_steps=1, callbacks=[board, asking(samples=0)]).train()
    make_trainer(tmp_path, **EVALUATED, max_steps=1, callbacks=[asking()]).train()
    assert board.texts == []


def test_a_tracker_that_fails_ends_nothing(tmp_path, caplog):
    """A full disk or a lost connection of what only shows must not cost a training; nor its secrets."""
    trainer = make_trainer(tmp_path, **EVALUATED, max_steps=3, callbacks=[Board(fails=True), asking()])
    with caplog.at_level(logging.WARNING, logger="hfkd.eval.tracking"):
        trainer.train()
    assert trainer.state.global_step == 3 and len(logged(trainer)) == 3
    (record,) = [record for record in caplog.records if record.name == "hfkd.eval.tracking"]
    assert "TensorBoard takes no sample completions" in record.getMessage()
    assert "hf_abc" not in record.getMessage()


def test_two_tasks_have_two_curves(tmp_path):
    """Two callbacks under one name would draw one line through the points of both."""
    other, seen = asking(name="forgotten", items=ITEMS[:2], samples=0), Seen()
    trainer = make_trainer(tmp_path, **EVALUATED, max_steps=1, callbacks=[asking(samples=0), other, seen])
    trainer.train()
    names = {name for _, logs in seen.curves() for name in logs}
    assert {"eval_k_shot_2", "eval_forgotten_k_shot_2", "eval_forgotten_k_shot_2_top_answer_share"} <= names


def test_samples_are_masked_and_cut():
    """Rows may hold secrets, and a tracker is a server of somebody else's."""
    items = [{"prompt": "my token is hf_abcdefghijklmnop", "completion": "x" * 3000}]
    report = evaluate_k_shot(
        make_model(), make_tokenizer(), items, [], PromptBuilder(make_tokenizer()), shots=(0,), max_new_tokens=2
    )
    (sample,) = sample_completions(report, items, 4)
    assert "hf_" not in sample.question and "***" in sample.question
    assert len(sample.gold) == 2001 and sample.gold.endswith("…")
    assert sample == Sample(sample.question, 0, report.results[0].texts[0], sample.gold, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, "0 items"),
        ({"shots": ()}, "the shots []"),
        ({"shots": (0, 9)}, "asks for 9 demonstrations and there are 4"),
        ({"extract": "txt"}, "extract is 'txt'"),
        ({"samples": -1}, "samples is -1"),
        ({"items": DEMONSTRATIONS[:1]}, "has the prompt of demonstration 0"),
    ],
)
def test_what_cannot_work_is_refused_before_training(change, message):
    """A fault that shows at the first evaluation costs all the steps before it."""
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        asking(**change)


def test_without_a_trainer_it_says_so():
    """An AttributeError of None helps nobody who forgot to pass the callback on."""
    with pytest.raises(RuntimeError, match=r"Pass it to a DistillationTrainer in callbacks=\[...\]"):
        asking().on_evaluate(None, None, None, metrics={"eval_loss": 1.0})


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    """An example that fails is worse than none."""
    page = (Path(__file__).parents[1] / "docs" / "tracking.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    make_tokenizer().save_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/tracking.md", "exec"), names)  # noqa: S102
    assert len(names["curve"]) == 3


def test_a_callback_that_is_added_later(tmp_path):
    """`add_callback` is as good as `callbacks=[...]`."""
    trainer = make_trainer(tmp_path, **EVALUATED, max_steps=1)
    trainer.add_callback(asking(samples=0))
    trainer.train()
    assert len(logged(trainer)) == 1
