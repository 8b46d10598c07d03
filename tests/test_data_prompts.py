"""Prompts and answers as texts and as chats, and their tokens."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hfkd.batch import IGNORE
from hfkd.data.messages import completion_text, prompt_key
from hfkd.data.prompts import PromptBuilder, PromptStyle
from hfkd.data.tokenize import answer_start, encode, prompt_length
from tests.conftest import CHAT_TEMPLATE, CORPUS, make_tokenizer

GO = {"prompt": "go", "completion": "went"}
SING = {"prompt": "sing", "completion": "sang"}
WALK = {"prompt": "walk", "completion": "walked"}
UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def learned(encoded: dict) -> list[int]:
    return [label for label in encoded["labels"] if label != IGNORE]


def test_text_prompt_is_written_as_documented(tokenizer) -> None:
    """A missing separator or a trailing space changes what a base model answers."""
    builder = PromptBuilder(tokenizer, PromptStyle(system="Past tense."))
    expected = "Past tense.\n\nQuestion: sing\nAnswer: sang\n\nQuestion: walk\nAnswer: walked\n\nQuestion: go\nAnswer:"
    assert builder.prompt(GO, [SING, WALK]) == expected
    assert tokenizer.decode(builder.encode_prompt(GO, [SING, WALK])) == expected
    assert tokenizer.decode(builder.encode_completion(GO)) == " went\n"


def test_braces_in_the_data_are_left_alone(tokenizer) -> None:
    """Code and JSON as questions would crash, or read attributes, if values were formatted a second time."""
    row = {"prompt": "{x} {prompt.__class__} }{", "completion": "{0}", "privileged_context": "{prompt}"}
    builder = PromptBuilder(tokenizer)
    assert builder.prompt(row, [row], privileged=True).endswith(
        "{prompt}\n\nQuestion: {x} {prompt.__class__} }{\nAnswer:"
    )
    assert tokenizer.decode(builder.encode_completion(row)) == " {0}\n"
    literal = PromptBuilder(tokenizer, PromptStyle(question="{{q}} {prompt}"))
    assert literal.prompt(GO) == "{q} go"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"question": "Q: {promt}"}, r"prompt.question .* unknown fields \['promt'\]; write \{prompt\}"),
        ({"question": "Q:"}, r"without the fields \['prompt'\]"),
        ({"answer": " {completion"}, "is no template"),
        ({"answer": "{}"}, "unknown fields"),
        ({"question": "{prompt.text}"}, "unknown fields"),
        ({"teacher_context": "{privileged_context}"}, r"without the fields \['prompt'\]"),
        ({"style": "html"}, "expected 'text' or 'chat'"),
    ],
)
def test_wrong_templates_are_refused_when_made(settings: dict, words: str) -> None:
    """A template without the question trains on prompts that ask nothing."""
    with pytest.raises(ValueError, match=words):
        PromptStyle(**settings)


def test_privileged_context_keeps_the_question_whole(tokenizer) -> None:
    """A teacher that reads the hint but not the question answers another question than the student."""
    row = GO | {"privileged_context": "It is went."}
    builder = PromptBuilder(tokenizer, PromptStyle(teacher_context="Hint: {privileged_context}\n{prompt}"))
    assert builder.prompt(row, [SING], privileged=True) == (
        "Question: sing\nAnswer: sang\n\nHint: It is went.\nQuestion: go\nAnswer:"
    )
    assert builder.prompt(row, [SING]) == builder.prompt(GO, [SING], privileged=True)
    chat = PromptBuilder(tokenizer, PromptStyle(style="chat"))
    assert chat.prompt(row, (), privileged=True)[-1] == user("It is went.\n\ngo")
    with pytest.raises(ValueError, match="no user message"):
        chat.prompt({"prompt": [{"role": "system", "content": "x"}], "privileged_context": "y"}, (), privileged=True)


def test_chat_prompt_has_demonstrations_as_turns(tokenizer) -> None:
    """Demonstrations pasted into one message aren't what a chat model was trained to follow."""
    builder = PromptBuilder(tokenizer, PromptStyle(style="chat", system="Past tense."))
    system = {"role": "system", "content": "Past tense."}
    assert builder.prompt(GO, [SING]) == [system, user("sing"), assistant("sang"), user("go")]
    text = tokenizer.decode(builder.encode_prompt(GO, [SING]))
    assert text.startswith("<|im_start|>system\nPast tense.<|im_end|>\n")
    assert text.endswith("<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(builder.encode_completion(GO)) == "went<|im_end|>\n"


def test_rows_of_messages_are_chats_whatever_the_style(tokenizer) -> None:
    """A list of messages written into a text template would train on its Python form."""
    own = {"role": "system", "content": "own", "tool_calls": None}
    row = {"prompt": [own, user("go")], "completion": [assistant("went")]}
    builder = PromptBuilder(tokenizer, PromptStyle(system="other"))
    shown = {"prompt": [{"role": "system", "content": "x"}, user("sing")], "completion": [assistant("sang")]}
    assert builder.prompt(row, [shown, WALK]) == [
        {"role": "system", "content": "own"}, user("sing"), assistant("sang"), user("walk"), assistant("walked"),
        user("go"),
    ]  # fmt: skip
    assert tokenizer.decode(builder.encode_completion(row)) == "went<|im_end|>\n"
    with pytest.raises(ValueError, match="set prompt.style to chat"):
        builder.prompt({"messages": None, "prompt": "go"}, [{"messages": [user("a"), assistant("b")]}])


def test_no_chat_template_and_refused_conversations_are_said() -> None:
    """transformers' own words don't say that prompt.style is the setting to change."""
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template.*prompt.style to text"):
        PromptBuilder(bare, PromptStyle(style="chat"))
    with pytest.raises(ValueError, match="no chat template"):
        PromptBuilder(bare).encode_prompt({"prompt": [user("go")]})
    bare.chat_template = "{{ raise_exception('only users here') }}"
    with pytest.raises(ValueError, match=r"refuses a conversation with the roles \['user'\]: only users here"):
        PromptBuilder(bare).encode_prompt({"prompt": [user("go")]})


def test_a_template_that_is_not_prefix_safe_is_refused() -> None:
    """Cutting at the prompt's length would learn a piece of the header, or lose the first token of the answer."""
    unsafe = make_tokenizer()
    unsafe.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="isn't prefix-safe.*prompt goes on '1<.*conversation '2<"):
        PromptBuilder(unsafe, PromptStyle(style="chat")).encode_completion(GO)


@pytest.mark.filterwarnings("ignore:The chat template marks no assistant turns")
def test_a_template_that_writes_no_text_is_refused() -> None:
    """Templates of some vision models skip plain texts: the question, or the answer, would be missing in silence."""
    skips = make_tokenizer()
    skips.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    for row in (GO, TALK):
        with pytest.raises(ValueError, match="doesn't write the content '.*' of a message of the role"):
            encode(PromptBuilder(skips, PromptStyle(style="chat")), row)


@pytest.mark.parametrize("style", ["text", "chat"])
def test_the_answer_has_the_same_tokens_behind_every_prompt(tokenizer, style: str) -> None:
    """BPE merges across the end of the prompt would shift the teacher's rows against the student's (pitfall P20)."""
    builder = PromptBuilder(tokenizer, PromptStyle(style=style, question="{prompt}", answer="{completion}"))
    for completion in ("went", "\n\nwent", " went ", "n", ":)", "swered"):
        row = {"prompt": "An", "completion": completion, "privileged_context": "Answer: "}
        student = encode(builder, row)
        teacher = encode(builder, row, [SING, WALK], privileged=True)
        assert learned(student) == learned(teacher) == builder.encode_completion(row)
        for view in (student, teacher):
            length = prompt_length(view)
            assert view["input_ids"][length:] == view["labels"][length:] == learned(view)
        assert student["input_ids"][: prompt_length(student)] == builder.encode_prompt(row)


def test_whole_text_learns_all_but_the_first_token(tokenizer) -> None:
    """The released SeCoKD code learns prompt and answer; position 0 has nothing before it that could predict it."""
    view = encode(PromptBuilder(tokenizer), GO, [SING], whole_text=True)
    assert view["labels"] == [IGNORE, *view["input_ids"][1:]]


def test_an_answer_or_a_prompt_without_tokens_is_refused(tokenizer) -> None:
    """Such an example would count in the batch and teach nothing, or lose its first answer token."""
    builder = PromptBuilder(tokenizer, PromptStyle(answer="{completion}"))
    with pytest.raises(ValueError, match="has no token"):
        encode(builder, {"prompt": "go", "completion": ""})
    with pytest.raises(ValueError, match="no 'completion'.*let the teacher write"):
        encode(builder, {"prompt": "go", "completion": None})
    empty = PromptStyle(builder=lambda row, shown, privileged: "")
    with pytest.raises(ValueError, match="prompt of a row has no token"):
        encode(PromptBuilder(tokenizer, empty), GO)


def test_a_builder_of_ones_own(tokenizer) -> None:
    """The place to plug in: one function decides the prompt, as text or as messages."""

    def texts(row: dict, demonstrations: list, privileged: bool) -> str:
        return f"{len(demonstrations)} {privileged} {row['prompt']} =>"

    def chats(row: dict, demonstrations: list, privileged: bool) -> list:
        return [user(texts(row, demonstrations, privileged))]

    assert PromptBuilder(tokenizer, PromptStyle(builder=texts)).prompt(GO, [SING], True) == "1 True go =>"
    assert tokenizer.decode(PromptBuilder(tokenizer, PromptStyle(builder=texts)).encode_completion(GO)) == " went\n"
    chat = PromptBuilder(tokenizer, PromptStyle(builder=chats))
    assert tokenizer.decode(chat.encode_prompt(GO)).endswith("0 False go =><|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(chat.encode_completion(GO)) == "went<|im_end|>\n"


@pytest.mark.parametrize("text", [" went", "went", "went\n", "  went \n"])
def test_a_generated_text_comes_back_as_a_completion(tokenizer, text: str) -> None:
    """A doubled space before the answer, or a lost gold answer, would teach and score something else."""
    builder = PromptBuilder(tokenizer)
    row = builder.with_answer({"prompt": "go", "completion": "gone"}, text)
    assert row == {"prompt": "go", "completion": "went", "answer": "gone"}
    assert tokenizer.decode(builder.encode_completion(row)) == " went\n"
    worded = PromptBuilder(tokenizer, PromptStyle(answer=" It is {completion}.\n"))
    assert worded.with_answer({"prompt": "go", "answer": "a"}, " It is went.")["completion"] == "went"
    messages = {"messages": [user("go"), assistant("gone")]}
    assert builder.with_answer(messages, text) == {"messages": [user("go"), assistant("went")], "answer": "gone"}
    turns = {"prompt": [user("go")], "completion": [assistant("gone")], "answer": "x"}
    assert builder.with_answer(turns, text) == turns | {"completion": [assistant("went")]}
    assert messages["messages"][1] == assistant("gone")


@pytest.mark.parametrize("marked", [True, False])
def test_an_unanswered_conversation_is_answered_behind_its_last_turn(marked: bool) -> None:
    """The user's question was overwritten by the answer, and the student learned to speak as the user."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if marked else UNMARKED
    builder, asked = PromptBuilder(tokenizer), {"messages": [user("go"), assistant("went"), user("sing")]}
    row = builder.with_answer(asked, " sang")
    assert row == {"messages": [user("go"), assistant("went"), user("sing"), assistant("sang")]}
    assert builder.with_answer(row, "sung") == {"messages": [*asked["messages"], assistant("sung")], "answer": "sang"}
    assert builder.encode_prompt(asked) == builder.encode_prompt(row)
    assert prompt_key(asked) == prompt_key(row) == "go went sing"
    assert tokenizer.decode(learned(encode(builder, row))).endswith("sang<|im_end|>\n")
    for lacking in ({"messages": [user("go")]}, {"messages": [user("go"), assistant("went"), user("sing")]}):
        with pytest.raises(ValueError, match="doesn't end with the assistant's turn, so there is no answer to learn"):
            completion_text(lacking)
        with pytest.raises(ValueError, match="doesn't end with the assistant's turn"):
            encode(builder, lacking)


# tokenizers that add tokens


def with_special_tokens(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return tokenizer


def test_bos_is_kept_and_a_trailing_eos_is_taken_off() -> None:
    """A prompt that ends in EOS says that the text is over; one without BOS isn't what the model was trained on."""
    plain = PromptBuilder(make_tokenizer()).encode_prompt(GO)
    assert PromptBuilder(with_special_tokens("<|im_start|> $A")).encode_prompt(GO) == [1, *plain]
    tokenizer = with_special_tokens("<|im_start|> $A <|im_end|>")
    both, chat = PromptBuilder(tokenizer), PromptBuilder(tokenizer, PromptStyle(style="chat"))
    assert both.encode_prompt(GO) == [1, *plain]
    assert both.encode_completion(GO) == PromptBuilder(make_tokenizer()).encode_completion(GO)
    assert chat.encode_prompt(GO) == PromptBuilder(make_tokenizer(), PromptStyle(style="chat")).encode_prompt(GO)


def test_a_text_that_ends_in_eos_itself_keeps_it() -> None:
    """Only what the tokenizer added may go, or a template that ends in such a token loses it."""
    builder = PromptBuilder(make_tokenizer(), PromptStyle(question="{prompt}<|im_end|>"))
    assert builder.encode_prompt(GO)[-1] == 2


def test_sentencepiece_tokenizers_get_no_second_space() -> None:
    """Such a tokenizer puts a space before any text: " went" alone would be two spaces, which no model generates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    row = {"prompt": "is", "completion": "was"}
    builder = PromptBuilder(sentencepiece, PromptStyle(answer=" {completion}"))
    pieces = sentencepiece.convert_ids_to_tokens(builder.encode_completion(row))
    assert "".join(pieces) == "▁was"
    whole = builder.encode_prompt(row) + builder.encode_completion(row)
    assert "".join(sentencepiece.convert_ids_to_tokens(whole)).endswith("Answer:▁was")


# conversations of several turns

TALK = {"messages": [user("go"), assistant("went"), user("sing"), assistant("sang")], "privileged_context": "hint"}
SHOWN = [WALK, {"messages": [user("eat"), assistant("ate"), user("run"), assistant("ran")]}]


def test_all_marked_assistant_turns_are_learned_and_demonstrations_never(tokenizer) -> None:
    """Only the last turn trains elsewhere (pitfall P21); a supervised demonstration would misalign the two views."""
    builder = PromptBuilder(tokenizer)
    student, teacher = encode(builder, TALK), encode(builder, TALK, SHOWN, privileged=True)
    assert tokenizer.decode(learned(student)) == "went<|im_end|>\nsang<|im_end|>\n"
    assert learned(student) == learned(teacher)
    text = tokenizer.decode(teacher["input_ids"])
    assert "walked" in text and "ran" in text and "hint\n\nsing" in text
    assert "hint" not in tokenizer.decode(student["input_ids"])
    for view in (student, teacher):
        assert all(label in (IGNORE, token) for token, label in zip(view["input_ids"], view["labels"], strict=True))
    starts = teacher["input_ids"][: prompt_length(teacher)]
    assert tokenizer.decode(starts).endswith("go<|im_end|>\n<|im_start|>assistant\n")


def test_pieces_write_the_text_of_the_template(tokenizer) -> None:
    """Cutting at the marks must lose and double nothing of what the template writes."""
    view = encode(PromptBuilder(tokenizer), TALK)
    assert tokenizer.decode(view["input_ids"]) == tokenizer.apply_chat_template(TALK["messages"], tokenize=False)


def test_the_last_answer_begins_behind_all_earlier_turns(tokenizer) -> None:
    """What is measured before an earlier answer is shorter than what a text is written behind."""
    builder = PromptBuilder(tokenizer)
    view = encode(builder, TALK, SHOWN, privileged=True)
    assert view["input_ids"][: answer_start(view)] == builder.encode_prompt(TALK, SHOWN, privileged=True)
    assert answer_start(view) > prompt_length(view)
    plain = encode(builder, GO)
    assert answer_start(plain) == prompt_length(plain) == len(builder.encode_prompt(GO))
    assert answer_start({"input_ids": [1, 2], "labels": [IGNORE, IGNORE]}) == 0


def test_the_prompt_of_a_conversation_ends_before_its_last_answer(tokenizer) -> None:
    """A teacher that writes the answer must not read it."""
    text = tokenizer.decode(PromptBuilder(tokenizer).encode_prompt(TALK, [WALK], privileged=True))
    assert text.endswith("hint\n\nsing<|im_end|>\n<|im_start|>assistant\n") and "sang" not in text


def test_without_marks_the_last_turn_is_learned_with_one_warning() -> None:
    """Learning one turn of several in silence looks like learning all of them."""
    pytest.importorskip("trl")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = UNMARKED
    builder = PromptBuilder(tokenizer)
    with pytest.warns(UserWarning, match="only the last assistant turn is learned"):
        view = encode(builder, TALK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = encode(builder, TALK, SHOWN, privileged=True)
    assert tokenizer.decode(learned(view)) == "sang<|im_end|>\n" and learned(view) == learned(teacher)


def test_without_trl_the_last_turn_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL is a help here, not a need."""
    monkeypatch.setitem(__import__("sys").modules, "trl.chat_template_utils", None)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = UNMARKED
    with pytest.warns(UserWarning, match="TRL isn't installed"):
        assert tokenizer.decode(learned(encode(PromptBuilder(tokenizer), TALK))) == "sang<|im_end|>\n"


def test_trl_marks_a_template_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most published templates have no marks; TRL's version of them has."""
    utils = pytest.importorskip("trl.chat_template_utils")
    monkeypatch.setattr(utils, "get_training_chat_template", lambda processing_class: CHAT_TEMPLATE)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = UNMARKED
    view = encode(PromptBuilder(tokenizer), TALK)
    assert tokenizer.decode(learned(view)) == "went<|im_end|>\nsang<|im_end|>\n"


def test_a_template_that_rewrites_turns_behind_demonstrations_is_refused() -> None:
    """The teacher would be supervised on other words than the student."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{% generation %}{{ message['content'] }}", "{% generation %}{{ messages | length }}{{ message['content'] }}"
    )
    with pytest.raises(ValueError, match="alone but .* behind demonstrations"):
        encode(PromptBuilder(tokenizer), TALK, SHOWN)


def test_style_can_be_copied_with_changes() -> None:
    """Recipes make styles from dictionaries; a frozen style must still be replaceable, checks included."""
    assert dataclasses.replace(PromptStyle(), separator="\n\n").separator == "\n\n"
    with pytest.raises(ValueError, match="unknown fields"):
        dataclasses.replace(PromptStyle(), question="{x}")
