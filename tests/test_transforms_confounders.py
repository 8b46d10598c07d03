"""The transform `confounders`: words that the student leans on and the teacher doesn't, taken out of prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import get_peft_model
from torch import nn
from training import lora, make_trainer, trained_weights
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.teachers import LocalTeacher, SelfTeacher, Teacher
from hfkd.transforms import Workshop, confounders
from hfkd.transforms.confounders import ConfounderRows
from hfkd.transforms.sensitivity import AskedRow, question_of, sensitivity, with_question
from hfkd.transforms.spans import confounding, leanings, runs, without

ROW = {"prompt": "What is the past tense of the verb?", "completion": "walked", "answer": "walked", "domain": "verbs"}
CHAT = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "  What is the past tense of the verb? "},
        {"role": "assistant", "content": "walked"},
    ]
}


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(make_tokenizer())


class Decoder(nn.Module):
    """The state at a place is the sum of all embeddings before it, each times a number of its place."""

    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(384, 16)
        self.factors = nn.Parameter(torch.tensor(factors))

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, return_dict=True):
        states = self.embed_tokens(input_ids)
        factors = torch.cat([self.factors, torch.zeros(states.shape[1])])[: states.shape[1], None]
        return BaseModelOutput(last_hidden_state=(states * factors).cumsum(dim=1))


class LinearModel(PreTrainedModel):
    """A causal LM whose gradients are known: proportional to the factor of a token's place."""

    config_class, base_model_prefix = LlamaConfig, "model"

    def __init__(self, factors: list[float]) -> None:
        super().__init__(LlamaConfig(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        self.model = Decoder(factors)
        self.lm_head = nn.Linear(16, 384, bias=False)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


def linear(places: list[int], factors: list[float]) -> LinearModel:
    """The factors stand at the places of the row's own tokens; the template plays no part."""
    all_factors = [0.0] * (max(places) + 1)
    for place, factor in zip(places, factors, strict=True):
        all_factors[place] = factor
    torch.manual_seed(0)
    return LinearModel(all_factors).eval()


def made(rows: list[dict], builder: PromptBuilder, student: nn.Module, teacher: nn.Module, **settings) -> list[dict]:
    shop = {name: settings.pop(name) for name in ("held_out", "demonstrations", "folder") if name in settings}
    return ConfounderRows(**settings).apply(rows, Workshop(student, LocalTeacher(teacher), builder, **shop))


def pieces(asked: AskedRow) -> list[str]:
    return [asked.text[start:end] for start, end in asked.spans]


def test_the_token_that_drives_the_student_alone_is_taken_out(builder):
    """Prevents taking out what the teacher leans on: token 2 is all that moves the student, and nothing to the
    teacher.
    """
    asked = AskedRow.of(ROW, builder)
    count = len(asked.places)
    student = linear(asked.places, [float(place == 2) for place in range(count)])
    teacher = linear(asked.places, [float(place != 2) for place in range(count)])
    norms = sensitivity(student, asked), sensitivity(teacher, asked)
    leaning = leanings(*(one.double().numpy() for one in norms))
    assert leaning.argmin() == 2 and runs(confounding(leaning, 0.05, 0.5)) == [(2, 3)]
    found = made([ROW], builder, student, teacher)
    start, end = asked.spans[2]
    assert found[0] is ROW and len(found) == 2, "the row as it was, and one copy"
    assert found[1] == {**ROW, "prompt": without(ROW["prompt"], (start, end))}


def test_two_runs_are_two_rows(builder):
    """Prevents one row without everything, where each run is to be told apart."""
    asked = AskedRow.of(ROW, builder)
    marked = [1, 1, 0, 1] + [0] * (len(asked.places) - 4)
    student = linear(asked.places, [float(one) for one in marked])
    teacher = linear(asked.places, [float(not one) for one in marked])
    found = made([ROW], builder, student, teacher)
    spans = (0, asked.spans[1][1]), asked.spans[3]
    assert [row["prompt"] for row in found] == [ROW["prompt"], *(without(ROW["prompt"], span) for span in spans)]


def test_runs_of_marks():
    """Prevents a run that is cut in two, or two that are joined."""
    assert runs([1, 1, 0, 1]) == [(0, 2), (3, 4)]
    assert runs([0, 0]) == [] and runs([1, 1]) == [(0, 2)]


def test_leanings_by_hand():
    """Prevents a difference that is taken the wrong way round, or of numbers on two scales."""
    student, teacher = np.array([0.0, 2.0, 4.0]), np.array([30.0, 10.0, 20.0])
    # stretched: student 0, .5, 1; teacher 1, 0, .5; differences 1, -.5, -.5; stretched again 1, 0, 0
    assert leanings(student, teacher).tolist() == [1.0, 0.0, 0.0]
    assert leanings(student, student).tolist() == [0.0, 0.0, 0.0]
    assert leanings(np.array([1.0, 1.0]), np.array([2.0, 3.0])).tolist() == [0.0, 1.0]


def test_the_quantile_and_the_cap():
    """Prevents that nothing is marked in a short prompt, that all of it is, or that the teacher's own words are."""
    leaning = np.array([0.9, 0.0, 0.6, 0.2, 1.0])
    assert confounding(leaning, 0.0, 0.5).tolist() == [False, True, False, False, False], "the lowest, whatever share"
    assert confounding(leaning, 0.19, 0.5).sum() == 1 and confounding(leaning, 0.2, 0.5).sum() == 2
    assert confounding(leaning, 0.9, 0.5).sum() == 2, "none above the cap"
    assert not confounding(np.zeros(4), 0.5, 0.5).any(), "nothing is known where all are alike"
    assert not confounding(np.zeros(0), 0.5, 0.5).any()


@pytest.mark.parametrize(
    ("span", "left"),
    [((0, 3), "two three"), ((4, 7), "one three"), ((8, 13), "one two"), ((5, 6), "one to three"), ((0, 13), "")],
)
def test_a_text_without_a_span(span, left):
    """Prevents double spaces, which a model reads as other tokens."""
    assert without("one two three", span) == left


def test_sensitivity_is_the_gradient_of_the_mean_answer_loss(builder):
    """Prevents gradients of the prompt's own loss, of a sum, or at places that are one off."""
    model, asked = make_model(seed=0), AskedRow.of(ROW, builder)
    ids = torch.tensor([asked.prompt + asked.answer])
    states = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=states).logits[0, len(asked.prompt) - 1 : -1]
    nn.functional.cross_entropy(logits, ids[0, len(asked.prompt) :]).backward()
    expected = states.grad[0, asked.places].norm(dim=-1)
    torch.testing.assert_close(sensitivity(model, asked), expected, rtol=1e-4, atol=1e-7)
    half = sensitivity(make_model(seed=0).bfloat16(), asked)
    assert half.dtype == torch.float32 and torch.allclose(half, expected, rtol=0.2, atol=0.05)


def test_only_embeddings_get_a_gradient(builder, tmp_path: Path):
    """Prevents the gradients of a whole model being kept, and a training that goes on from what was looked at."""
    ends = []
    for looked in (False, True):
        trainer = make_trainer(tmp_path / str(looked), teacher=LocalTeacher(make_model(seed=1)), peft_config=lora())
        if looked:
            trainer.model.train()
            teacher = trainer.teacher.model
            found = made([ROW], builder, trainer.model, teacher)
            assert len(found) > 1 and trainer.model.training
            for model in (trainer.model, teacher):
                assert all(parameter.grad is None for parameter in model.parameters())
                assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Embedding))
        trainer.train()
        ends.append(trained_weights(trainer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_words_are_found_in_a_template_by_their_characters(builder):
    """Prevents that the template's words are taken out, and that a word of the row goes unseen."""
    asked = AskedRow.of(ROW, builder)
    assert "".join(pieces(asked)) == ROW["prompt"].replace(" ", "") or "".join(pieces(asked)) == ROW["prompt"]
    assert asked.prompt == builder.encode_prompt(ROW) and asked.answer == builder.encode_completion(ROW)
    doubled = {**ROW, "prompt": "Answer: Question"}  # words of the template itself
    asked = AskedRow.of(doubled, builder)
    assert asked.text == "Answer: Question" and asked.places[0] > 0


def test_of_a_conversation_the_last_question_is_changed(builder):
    """Prevents earlier turns, the system message or the answer from being cut."""
    asked = AskedRow.of(CHAT, builder)
    assert asked.text in ("  What is the past tense of the verb? ", "What is the past tense of the verb?")
    ids = builder.tokenizer.decode([asked.prompt[place] for place in asked.places])
    assert ids.split() == asked.text.split()
    changed = with_question(CHAT, "Why?")
    assert [turn["content"] for turn in changed["messages"]] == [
        *(turn["content"] for turn in CHAT["messages"][:3]),
        "Why?",
        "walked",
    ]
    assert question_of(CHAT) == CHAT["messages"][3]["content"]
    found = made([CHAT], builder, make_model(seed=0), make_model(seed=1))
    assert len(found) > 1 and all(row["messages"][:3] == CHAT["messages"][:3] for row in found)


def test_letters_of_several_tokens_stay_whole(builder):
    """Prevents half a letter: bytes of one character are several tokens of it."""
    row = {"prompt": "Wie heißt 東京 auf Deutsch?", "completion": "Tokio"}
    asked = AskedRow.of(row, builder)
    assert len(asked.places) > len(set(asked.spans)), "some tokens share a character"
    for copy in made([row], builder, make_model(seed=0), make_model(seed=1), share=0.3)[1:]:
        assert "\ufffd" not in copy["prompt"] and set(copy["prompt"]) <= set(row["prompt"])


def test_white_space_is_never_taken_out(builder):
    """Prevents a copy that says the same in other white space."""
    row = {"prompt": "one\n\n\ntwo\n  \n three", "completion": "x"}
    asked = AskedRow.of(row, builder)
    assert [piece for piece, yes in zip(pieces(asked), asked.removable(), strict=True) if not yes]
    count = len(asked.places)
    blank = [float(not yes) for yes in asked.removable()]
    student, teacher = linear(asked.places, blank), linear(asked.places, [1 - one for one in blank])
    assert made([row], builder, student, teacher) == [row] and count == len(blank)


def test_what_is_spared_is_never_taken_out(builder):
    """Prevents a word problem without its numbers, whose answer is another one."""
    row = {"prompt": "9 and 4 and one", "completion": "x"}
    asked = AskedRow.of(row, builder)
    numbers = [float(piece.strip().isdigit()) for piece in pieces(asked)]
    assert sum(numbers) == 2
    student, teacher = linear(asked.places, numbers), linear(asked.places, [1 - one for one in numbers])
    assert [copy["prompt"] for copy in made([row], builder, student, teacher)[1:]] == [
        "and 4 and one",
        "9 and and one",
    ]
    assert made([row], builder, student, teacher, spare=r"\d") == [row]


def test_a_copy_that_asks_a_held_out_question_is_left_out(builder):
    """Prevents training on a question of the evaluation, with another question's answer."""
    plain = made([ROW], builder, make_model(seed=0), make_model(seed=1), share=0.2)
    assert len(plain) > 1
    held_out = [{"prompt": plain[1]["prompt"].upper(), "completion": "x"}]
    found = made([ROW], builder, make_model(seed=0), make_model(seed=1), share=0.2, held_out=held_out)
    assert found == [plain[0], *plain[2:]]


def test_a_copy_that_asks_what_a_demonstration_answers_is_left_out(builder):
    """Prevents a question whose answer the teacher's prompt shows: the teacher would copy it."""
    plain = made([ROW], builder, make_model(seed=0), make_model(seed=1), share=0.2)
    shown = [{"prompt": plain[1]["prompt"], "completion": "x"}]
    found = made([ROW], builder, make_model(seed=0), make_model(seed=1), share=0.2, demonstrations=shown)
    assert len(plain) > 1 and found == [plain[0], *plain[2:]]


def test_one_word_is_not_taken_out_of_nothing(builder):
    """Prevents an empty prompt."""
    row = {"prompt": "Q", "completion": "x"}
    assert made([row], builder, make_model(seed=0), make_model(seed=1)) == [row]


def test_a_long_row_is_left_alone(builder):
    """Prevents one long row from ending the run, and says so where all are too long."""
    rows = [ROW, {"prompt": "long " * 60, "completion": "yes"}]
    transform = ConfounderRows(max_length=60)
    found = transform.apply(rows, Workshop(make_model(seed=0), LocalTeacher(make_model(seed=1)), builder))
    told = transform.describe()
    assert found[-1] == rows[1] and (told["rows"], told["looked_at"], told["changed"]) == (2, 1, 1)
    assert told["made"] == len(found) - 2
    with pytest.raises(ValueError, match="raise max_length"):
        made(rows, builder, make_model(seed=0), make_model(seed=1), max_length=2)


def test_a_resumed_run_reads_what_was_found(builder, tmp_path: Path, monkeypatch):
    """Prevents gradients being taken again at each resume, and other settings from being read into old ones."""
    models = make_model(seed=0), make_model(seed=1)
    first = made([ROW], builder, *models, folder=tmp_path)
    wide = made([ROW], builder, *models, share=0.4)
    monkeypatch.setattr(confounders, "sensitivity", None)
    assert made([ROW], builder, *models, folder=tmp_path) == first
    assert made([ROW], builder, *models, folder=tmp_path, share=0.4) == wide != first
    with pytest.raises(TypeError):
        made([ROW], builder, make_model(seed=2), models[1], folder=tmp_path)


def test_a_student_with_an_adapter(builder):
    """Prevents that the adapter is skipped, or that an unknown wrapper hides the embeddings."""
    torch.manual_seed(5)
    student, asked = get_peft_model(make_model(seed=0), lora()), AskedRow.of(ROW, builder)
    found = sensitivity(student, asked)
    with student.disable_adapter():
        assert torch.allclose(sensitivity(student, asked), sensitivity(make_model(seed=0), asked), rtol=1e-4)
    assert not torch.allclose(found, sensitivity(make_model(seed=0), asked), rtol=1e-2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 1.0}, "share is 1.0"),
        ({"share": -0.1}, "share is -0.1"),
        ({"cap": 0}, "cap is 0"),
        ({"cap": 2}, "cap is 2"),
        ({"max_length": 1}, "max_length is 1"),
        ({"share": True}, "share is True"),
        ({"spare": "("}, "no regular expression"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(settings, words):
    """Prevents a fault that shows only after the models were loaded."""
    with pytest.raises(ValueError, match=words):
        ConfounderRows(**settings)


def test_teachers_that_say_nothing_of_their_own_are_refused(builder):
    """Prevents a run in which teacher and student are one, so that no word is ever a confounder."""
    student, teacher = get_peft_model(make_model(seed=0), lora()), SelfTeacher("adapter_off")
    teacher.prepare(None, student)
    with pytest.raises(ValueError, match=r"\(self\) has the student's own weights"):
        ConfounderRows().apply([ROW], Workshop(student, teacher, builder))
    with pytest.raises(ValueError, match="there is no teacher"):
        ConfounderRows().apply([ROW], Workshop(student, None, builder))

    class Silent(Teacher):
        def signal(self, batch, needs):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Silent has no model"):
        ConfounderRows().apply([ROW], Workshop(student, Silent(), builder))


def test_a_row_that_cannot_be_cut_is_named(builder):
    """Prevents rows from being passed over in silence."""
    rows = [ROW, {"prompt": "no answer"}]
    with pytest.raises(ValueError, match="training row 1: .*'completion'"):
        made(rows, builder, make_model(seed=0), make_model(seed=1))
    own = PromptBuilder(
        make_tokenizer(), PromptStyle(builder=lambda row, shown, told: f"{row['prompt']} twice {row['prompt']}")
    )
    with pytest.raises(ValueError, match="training row 0: the prompt doesn't hold the row's own words once"):
        made([ROW], own, make_model(seed=0), make_model(seed=1))
