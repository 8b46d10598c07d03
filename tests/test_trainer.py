"""The trainer: the same number on every path, and an error where there is nothing to learn."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_model, make_tokenizer
from torch import nn
from training import DEMONSTRATIONS, ROWS, lora, make_trainer, run, trained_weights, worst_difference

from hfkd import Divergence, LocalTeacher, Objective, SelfTeacher
from hfkd.data.collate import DistillationCollator
from hfkd.errors import CheckpointError, HeadError, NonFiniteLoss, NothingToLearn, VocabularyError
from hfkd.terms import Term

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The reference: eight examples a step in one micro-batch."""
    return run(tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("size, accumulation", [(4, 2), (1, 8)])
def test_accumulation_does_not_change_the_update(tmp_path, straight, size, accumulation):
    """A loss that is averaged per micro-batch weighs short answers more, or grows with the accumulation."""
    update, losses = run(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    assert worst_difference(straight[0], update) < TOLERANCE
    assert losses == pytest.approx(straight[1], rel=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 5, 10_000])
def test_chunk_size_does_not_change_the_update(tmp_path, straight, chunk_size):
    """A setting for memory that changes the result makes every tuned learning rate wrong on another machine."""
    update, _ = run(tmp_path, chunk_size=chunk_size)
    assert worst_difference(straight[0], update) < TOLERANCE


def test_padding_side_does_not_change_the_update(tmp_path, straight):
    """Positions or labels that move with the padding train the student on something else."""
    collator = DistillationCollator(make_tokenizer().pad_token_id, padding_side="left")
    trainer = make_trainer(tmp_path)
    trainer.data_collator = collator
    before = trained_weights(trainer)
    trainer.train()
    update = {name: value - before[name] for name, value in trained_weights(trainer).items()}
    assert worst_difference(straight[0], update) < TOLERANCE


def test_prefix_reuse_does_not_change_the_update(tmp_path, straight):
    """A teacher that is faster but says something else is no teacher."""
    trainer = make_trainer(tmp_path / "with")
    assert len(trainer.teacher.prefix) >= 32, (
        "the prefix of this data set is too short to be reused; the test shows nothing"
    )
    update, _ = run(tmp_path / "without", teacher=SelfTeacher(reuse_prefix=False), peft_config=lora())
    assert worst_difference(straight[0], update) < TOLERANCE


def test_loss_is_the_mean_over_tokens_by_hand(tmp_path):
    """The logged loss must be the KL per token that a user computes from two full forward passes."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=16, max_steps=1)
    features = [trainer.train_dataset[place] for place in range(16)]
    total, count = 0.0, 0
    model = trainer.model
    for feature in features:
        logs = []
        for view in (feature["student"], feature["teacher"]):
            ids = torch.tensor([view["input_ids"]])
            labels = torch.tensor(view["labels"])
            with torch.no_grad():
                if view is feature["teacher"]:
                    with model.disable_adapter():
                        logits = model.eval()(input_ids=ids).logits[0]
                else:
                    logits = model.eval()(input_ids=ids).logits[0]
            logs.append(logits[:-1][labels[1:] != -100].double().log_softmax(-1))
        student, teacher = logs
        total += float((teacher.exp() * (teacher - student)).sum())
        count += student.shape[0]
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(total / count, rel=1e-5)
    assert trainer.state.log_history[0]["loss/forward_kl"] == pytest.approx(logged, rel=1e-5)


def test_logs_say_what_a_user_needs(tmp_path):
    """Tokens per second, the teacher's share and the agreement are the first things looked for when a run is slow or
    learns nothing.
    """
    trainer = make_trainer(tmp_path)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert 0 <= entry["teacher/agreement"] <= 1
    assert 0 < entry["speed/teacher_share"] < 1
    assert entry["speed/tokens_per_second"] > 0


def test_evaluation_is_per_token_over_the_whole_set(tmp_path):
    """A mean of batch means depends on the batch size (peers report evaluation losses a thousand times the training
    loss).
    """
    losses = []
    for size in (1, 3, 16):
        trainer = make_trainer(tmp_path / str(size), eval_dataset=ROWS[:16], per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        losses.append(metrics["eval_loss"])
        assert metrics["eval_loss/forward_kl"] == pytest.approx(metrics["eval_loss"])
        assert 0 <= metrics["eval_teacher/agreement"] <= 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] > 0


def test_training_learns(tmp_path):
    """The point of it all: the student comes closer to its prompted teacher."""
    trainer = make_trainer(tmp_path, max_steps=40, optim="adamw_torch", learning_rate=5e-3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_full_student_with_local_teacher_and_hard_labels(tmp_path, teacher_model):
    """A full model, another model as teacher, two terms: the plainest use of all."""
    update, losses = run(
        tmp_path,
        teacher=LocalTeacher(teacher_model),
        objective=[
            {"kind": "reverse_kl", "weight": 0.5, "temperature": 2.0},
            {"kind": "cross_entropy", "weight": 0.5},
        ],
        demonstrations=[],
        learning_rate=0.01,
    )
    assert any("embed_tokens" in name for name in update)
    assert all(math.isfinite(loss) for loss in losses)


def test_without_a_teacher_it_is_fine_tuning(tmp_path):
    """The baseline at equal budget must be the Trainer's own loss, or the comparison with distillation is no
    comparison.
    """
    trainer = make_trainer(
        tmp_path, teacher=None, objective="cross_entropy", demonstrations=[], max_steps=1, learning_rate=0.0
    )
    features = [trainer.train_dataset[place] for place in range(16)]
    trainer.args.per_device_train_batch_size = 16
    trainer._train_batch_size = 16
    inputs = trainer.data_collator([{**feature, "teacher": None} for feature in features])
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).loss
        ours = trainer.compute_loss(trainer.model, inputs)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


class Jeffreys(Divergence):
    """A user's own loss: forward plus reverse KL, with a factor that it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def between(self, student, teacher):
        """Both directions at once."""
        return self.factor * ((student.exp() - teacher.exp()) * (student - teacher)).sum(-1)


def test_a_loss_of_ones_own_and_its_parameter(tmp_path):
    """A loss written by a user must train, its own parameter included, and come back with a checkpoint."""
    trainer = make_trainer(
        tmp_path, objective=Objective([Term("jeffreys", Jeffreys())]), save_strategy="steps", save_steps=2
    )
    trainer.train()
    factor = trainer.objective.losses[0].factor.item()
    assert factor != 1.0
    assert "loss/jeffreys" in trainer.state.log_history[0]
    again = make_trainer(tmp_path, objective=Objective([Term("jeffreys", Jeffreys())]), max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.objective.losses[0].factor.item() == pytest.approx(factor)


class Counting(SelfTeacher):
    """A teacher with a state: the steps that it has seen."""

    steps = 0

    def after_step(self, step):
        """Count."""
        super().after_step(step)
        self.steps += 1

    def state_dict(self):
        """The count."""
        return {"steps": torch.tensor([self.steps])}

    def load_state_dict(self, state):
        """The count back."""
        self.steps = int(state["steps"])


def test_the_state_of_a_teacher_is_in_the_checkpoint(tmp_path):
    """A teacher that moves (an average of the student, say) would begin again from nothing after a resume."""
    settings = {"peft_config": lora(), "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, teacher=Counting(), **settings).train()
    again = make_trainer(tmp_path, teacher=Counting(), **{**settings, "max_steps": 3})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.teacher.steps == 3
    (tmp_path / "checkpoint-2" / "teacher.safetensors").unlink()
    for path in tmp_path.glob("*/hfkd_checkpoint.json"):  # that one of an older hfkd, whose files nobody listed
        path.unlink()
    with pytest.raises(CheckpointError, match="teacher.safetensors"):
        make_trainer(tmp_path, teacher=Counting(), **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_resumed_equals_straight(tmp_path):
    """A run that was stopped must continue, not begin again with other demonstrations or another order."""
    settings = {
        "student_shots": (0, 1, 2),
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    whole = make_trainer(tmp_path / "whole", max_steps=4, **settings)
    whole.train()
    first = make_trainer(tmp_path / "parts", max_steps=4, **settings)
    first.train()
    resumed = make_trainer(tmp_path / "parts", max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    ours, theirs = trained_weights(whole), trained_weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_saved_adapter_holds_no_teacher(tmp_path):
    """A checkpoint must hold the student's adapter, not the base or the teacher, and load with PEFT alone."""
    from peft import PeftModel

    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 200_000
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    loaded = PeftModel.from_pretrained(make_model(seed=0), str(tmp_path / "out"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(
            loaded.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits, atol=1e-5
        )


# --- refusals
# --------------------------------------------------------------------------------------------------------------


def test_a_term_without_a_teacher_is_refused(tmp_path):
    """A missing teacher must be said at once, not as an attribute error in the first step."""
    with pytest.raises(ValueError, match="there is no teacher"):
        make_trainer(tmp_path, teacher=None)


def test_self_teacher_without_a_second_prompt_is_refused(tmp_path):
    """The same weights on the same prompt teach nothing: the loss would be 0 from the start."""
    with pytest.raises(ValueError, match="demonstrations"):
        make_trainer(tmp_path, demonstrations=[])


def test_adapter_off_without_an_adapter_is_refused(tmp_path):
    """Nothing could be switched off, and the student would teach itself."""
    with pytest.raises(ValueError, match="needs a student with an adapter"):
        make_trainer(tmp_path, teacher=SelfTeacher("adapter_off"))


def test_lora_on_the_head_is_refused(tmp_path):
    """A head that is read past its adapter would train an adapter that is never used."""
    with pytest.raises(HeadError, match="lm_head"):
        make_trainer(
            tmp_path,
            peft_config=lora(target_modules=["q_proj", "lm_head"]),
            model=make_model(tie_word_embeddings=False),
        )


def test_other_ids_are_refused(tmp_path):
    """Trains against the wrong tokens, silently, where only sizes are compared."""
    from transformers import PreTrainedTokenizerFast

    other = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocab = other["model"]["vocab"]
    first, second = list(vocab)[40:42]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    from tokenizers import Tokenizer

    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(other)))
    with pytest.raises(VocabularyError, match="id "):
        make_trainer(tmp_path, teacher=LocalTeacher(make_model(seed=1), tokenizer=theirs), demonstrations=[])


def test_a_teacher_that_cannot_read_all_ids_is_refused(tmp_path):
    """It would be an index error, or a dead GPU, in the first batch with such an id."""
    with pytest.raises(VocabularyError, match="can read the first 300 only"):
        make_trainer(tmp_path, teacher=LocalTeacher(make_model(seed=1, vocab_size=300)), demonstrations=[])


def test_nothing_supervised_is_loud(tmp_path):
    """A loss of exactly 0 on data with nothing to learn looks like success."""

    def nothing(features):
        inputs = DistillationCollator(2)(features)
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        inputs["teacher_labels"] = torch.full_like(inputs["teacher_labels"], -100)
        return inputs

    trainer = make_trainer(tmp_path)
    trainer.data_collator = nothing
    with pytest.raises(NothingToLearn, match="No token is supervised"):
        trainer.train()


def test_a_masked_micro_batch_beside_others_is_no_error(tmp_path):
    """One fully masked micro-batch must give 0 and still take part in backward."""
    calls = []

    def second_masked(features):
        inputs = DistillationCollator(2)(features)
        calls.append(1)
        if len(calls) % 2 == 0:
            inputs["labels"] = torch.full_like(inputs["labels"], -100)
            inputs["teacher_labels"] = torch.full_like(inputs["teacher_labels"], -100)
        return inputs

    trainer = make_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.data_collator = second_masked
    trainer.train()
    assert all(
        math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry
    )


def test_non_finite_loss_stops_and_names_the_step_and_the_term(tmp_path):
    """Training on NaN ruins every weight and is noticed hours later."""
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        next(value for name, value in trainer.model.named_parameters() if value.requires_grad).fill_(float("nan"))
    with pytest.raises((NonFiniteLoss, HeadError)) as caught:
        trainer.train()
    assert "step 1" in str(caught.value) and "forward_kl" in str(caught.value)


def test_wrong_settings_are_refused(tmp_path):
    """Settings that would change the loss or lose a view are errors, not warnings."""
    with pytest.raises(ValueError, match="remove_unused_columns"):
        make_trainer(tmp_path, remove_unused_columns=True)
    with pytest.raises(ValueError, match="average_tokens_across_devices"):
        make_trainer(tmp_path, average_tokens_across_devices=False)


def test_demonstrations_are_only_in_the_teachers_view(tmp_path):
    """If the student read the demonstrations too there would be nothing to internalise."""
    trainer = make_trainer(tmp_path)
    example = trainer.train_dataset[0]
    assert len(example["teacher"]["input_ids"]) > len(example["student"]["input_ids"]) + 10 * len(DEMONSTRATIONS)
