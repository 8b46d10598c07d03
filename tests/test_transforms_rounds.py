"""`rounds`: which questions are hard, what is made of them, and what is left out and counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from workshops import scripted

from hfkd.transforms import TRANSFORMS
from hfkd.transforms.rounds import CompetitiveRounds, grade_of

ROWS = [{"prompt": "easy one", "completion": "yes"}, {"prompt": "hard one", "completion": "blue"}]


def contest(who: str, prompt: str, seed: int) -> str:
    """The student knows what is easy; each hard question becomes another hard one with one more mark."""
    if who == "student":
        return "yes" if "easy" in prompt else "dunno"
    if "How good is the answer" in prompt:
        return "10" if "grade: yes" in prompt else "Grade: 2 of 10"
    if "Write one new question" in prompt:
        return f"{prompt.split('Question: ')[1].splitlines()[0]}!"
    return f"the answer to {prompt.count('!')} marks"


def prompts(rows: list[dict]) -> list[str]:
    return [row["prompt"] for row in rows]


@pytest.mark.parametrize("chat", [True, False])
def test_hard_questions_beget_hard_questions(chat):
    """Prevents new questions of what the student knows, or ones that are answered by the student."""
    transform, workshop = CompetitiveRounds(rounds=3), scripted(contest, chat=chat)
    made = transform.apply(ROWS, workshop)
    assert prompts(made) == ["easy one", "hard one", "hard one!", "hard one!!", "hard one!!!"]
    assert [row["completion"] for row in made[2:]] == [f"the answer to {count} marks" for count in (1, 2, 3)]
    told = transform.describe()["rounds"]
    assert [one["answered"] for one in told] == [2, 1, 1] and [one["hard"] for one in told] == [1, 1, 1]
    assert len(workshop.said) == 3


def test_it_ends_where_nothing_is_hard():
    """Prevents rounds that ask models about nothing."""
    transform = CompetitiveRounds(rounds=4)
    assert transform.apply(ROWS[:1], scripted(contest)) == ROWS[:1]
    assert len(transform.describe()["rounds"]) == 1


def test_questions_that_are_known_are_left_out_and_counted():
    """Prevents evaluation items, demonstrations or doubles in the training rows."""
    rows = [{"prompt": f"hard {place}", "completion": "blue"} for place in range(5)]
    new = {0: "Held  OUT", 1: "shown before", 2: "hard 3", 3: "a new one", 4: " "}

    def script(who: str, prompt: str, seed: int) -> str:
        if "Write one new question" in prompt:
            return new[int(prompt.split("hard ")[1][0])]
        return contest(who, prompt, seed)

    held_out = [{"prompt": "held out", "completion": "x"}]
    shown = [{"prompt": "shown before", "completion": "x"}]
    transform = CompetitiveRounds(rounds=1)
    made = transform.apply(rows, scripted(script, held_out=held_out, demonstrations=shown))
    assert prompts(made[5:]) == ["a new one"]
    (told,) = transform.describe()["rounds"]
    expected = {"answered": 5, "without_grade": 0, "hard": 5, "new": 1, "empty": 1, "known_before": 3}
    assert told == expected


@pytest.mark.parametrize(
    "reply",
    [
        "Question: Held  out one",
        "question: Question: held out one\nAnswer: blue",
        "New question: held out one",
        'Here is one:\n\n"held out one"',
        "**Held out one**",
        "held out one\n\nIt is of the same kind.",
    ],
)
def test_a_held_out_question_in_other_clothes_is_known(reply):
    """Prevents an evaluation item that comes into training because the teacher writes a word before it."""

    def script(who: str, prompt: str, seed: int) -> str:
        return reply if "Write one new question" in prompt else contest(who, prompt, seed)

    transform = CompetitiveRounds(rounds=1)
    workshop = scripted(script, held_out=[{"prompt": "held out one", "completion": "x"}])
    assert transform.apply(ROWS, workshop) == ROWS
    (told,) = transform.describe()["rounds"]
    assert (told["new"], told["known_before"]) == (0, 1)


@pytest.mark.parametrize(
    ("question", "reply", "asked"),
    [
        ("Question: {prompt}\nAnswer:", "Question: a new one: which?\nAnswer: blue", "a new one: which?"),
        ("Was {prompt}?", "Wasp?", "Wasp"),
        ("Was {prompt}?", "was it so?", "it so"),
    ],
)
def test_words_of_the_prompt_are_taken_off_a_new_question(question, reply, asked):
    """Prevents questions that read "Question: Question: ...", and ones that lose a part of their first word."""

    def script(who: str, prompt: str, seed: int) -> str:
        return reply if "Write one new question" in prompt else contest(who, prompt, seed)

    workshop = scripted(script)
    workshop.builder.style = replace(workshop.builder.style, question=question)
    assert prompts(CompetitiveRounds(rounds=1).apply(ROWS, workshop)[2:]) == [asked]


def test_a_row_takes_its_answer_column_or_is_refused_before_anybody_writes():
    """Prevents a round that is paid for and then stops at a row that has nothing to grade against."""
    workshop = scripted(contest)
    made = CompetitiveRounds(rounds=1).apply([{"prompt": "hard one", "answer": "blue"}], workshop)
    assert made[0]["completion"] == "blue" and len(made) == 2
    assert any("A right answer: blue" in text for _, text, _ in workshop.rollout.asked)
    workshop = scripted(contest)
    with pytest.raises(ValueError, match=r"rounds: row 1 \('bare'\) has no answer"):
        CompetitiveRounds(rounds=1).apply([ROWS[0], {"prompt": "Bare"}], workshop)
    assert not workshop.rollout.asked


def test_an_answer_without_a_grade_is_not_hard_and_is_counted():
    """Prevents a teacher that can't grade from making every question hard."""

    def script(who: str, prompt: str, seed: int) -> str:
        return "very good" if "How good is the answer" in prompt else contest(who, prompt, seed)

    transform = CompetitiveRounds(rounds=2)
    assert transform.apply(ROWS, scripted(script)) == ROWS
    (told,) = transform.describe()["rounds"]
    assert told["without_grade"] == 2 and told["hard"] == 0


def test_new_questions_without_an_answer_are_left_out():
    """Prevents rows that have nothing to learn."""

    def script(who: str, prompt: str, seed: int) -> str:
        return "" if "!" in prompt else contest(who, prompt, seed)

    transform = CompetitiveRounds(rounds=1)
    assert transform.apply(ROWS, scripted(script)) == ROWS
    assert transform.describe()["rounds"][0]["empty"] == 1


def test_a_verifier_grades_in_place_of_the_teacher():
    """Prevents a teacher that is asked for grades nobody reads; in the second round the teacher's answer is right."""
    workshop = scripted(contest)
    made = CompetitiveRounds(rounds=2, verifier="exact").apply(ROWS, workshop)
    assert prompts(made) == ["easy one", "hard one", "hard one!", "hard one!!"]
    assert not any("How good is the answer" in text for _, text, _ in workshop.rollout.asked)


def test_most_takes_the_worst():
    """Prevents the first questions of the file from being taken for the hardest."""
    marks = {"a": "4", "b": "1", "c": "3"}

    def script(who: str, prompt: str, seed: int) -> str:
        if "How good is the answer" in prompt:
            return marks[prompt.split("Question: hard ")[1][0]]
        return contest(who, prompt, seed)

    rows = [{"prompt": f"hard {name}", "completion": "blue"} for name in marks]
    made = CompetitiveRounds(rounds=1, most=2).apply(rows, scripted(script))
    assert prompts(made[3:]) == ["hard b!", "hard c!"]


def test_settings_of_each_kind_of_text():
    """Prevents sampled grades, greedy questions, and settings that stay changed behind the transform."""
    workshop = scripted(contest, chat=True)
    CompetitiveRounds(rounds=1, temperature=0.9, max_new_tokens=50).apply(ROWS, workshop)
    used = {}
    for _, text, settings in workshop.rollout.asked:
        kind = "grade" if "How good" in text else "question" if "Write one" in text else "answer"
        used.setdefault(kind, set()).add((settings.temperature, settings.max_new_tokens, settings.stop))
    assert used["grade"] == {(0.0, 8, ())} and used["question"] == {(0.9, 50, ())}
    assert used["answer"] == {(0.0, 32, ("\n",))}
    assert workshop.rollout.settings.max_new_tokens == 32 and workshop.rollout.settings.temperature == 0.0


def test_what_was_written_is_not_written_again(tmp_path):
    """Prevents a run that was killed from beginning the contest anew."""
    workshop = scripted(contest, folder=tmp_path)
    first = CompetitiveRounds(rounds=2).apply(ROWS, workshop)
    asked = len(workshop.rollout.asked)
    assert CompetitiveRounds(rounds=2).apply(ROWS, workshop) == first
    assert asked > 0 and len(workshop.rollout.asked) == asked


def test_the_given_rows_come_first_and_stay_as_they_are():
    """Prevents rows without their other columns, or changed ones."""
    rows = [{**row, "domain": "colours"} for row in ROWS]
    made = CompetitiveRounds(rounds=1).apply(rows, scripted(contest))
    assert made[:2] == rows == [{**row, "domain": "colours"} for row in ROWS] and made[0] is not rows[0]


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("7", 0.7),
        ("Grade: 10/10", 1.0),
        ("3.5 of 10", 0.35),
        ("0", 0.0),
        ("good", None),
        ("Out of 10, I would give it 3", 0.3),
        ("On a scale of 0 to 10: 8", 0.8),
        ("Grade (0-10): 3", 0.3),
        ("From 0 (wrong) to 10 (right): 4", 0.4),
        ("10 out of 10.", 1.0),
        ("It is 2 + 2 = 4, so 0.", None),
        ("2/3", None),
        ("7-8", None),
        ("3.5x", None),
        ("100", None),
        ("-3", None),
        ("", None),
    ],
)
def test_grades_are_read_from_replies(reply, grade):
    """Prevents a grade from a number that is none: the scale's own, or a step on the way to it."""
    assert grade_of(reply) == grade


def test_conversations_are_refused_in_words():
    """Prevents a template that is filled with a list of messages."""
    with pytest.raises(ValueError, match="row 0 has no prompt in plain text"):
        CompetitiveRounds().apply([{"messages": [{"role": "user", "content": "hi"}]}], scripted(contest))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"most": 0}, "most is 0"),
        ({"hard_below": 2}, "hard_below is 2"),
        ({"hard_below": 0.0}, "nothing would be hard"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"verifier": "right"}, "verifier is 'right'"),
        ({"verifier": "reasoning_gym", "rounds": 2}, "verifier is reasoning_gym and rounds is 2"),
        ({"grade_prompt": "{prompt} {answer}"}, "grade_prompt has the fields"),
        ({"rewrite_prompt": "{prompt"}, "which is no template"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    """Prevents a fault that is found when the models are loaded."""
    with pytest.raises(ValueError, match=message):
        CompetitiveRounds(**settings)


def test_it_has_its_key_and_asks_for_a_teacher():
    """Prevents a transform that no recipe can name, or a recipe without a teacher that runs for an hour."""
    assert TRANSFORMS["rounds"] == f"{CompetitiveRounds.__module__}:{CompetitiveRounds.__name__}"
    assert CompetitiveRounds.needs_teacher


def test_the_checkers_of_tasks_are_for_one_round():
    """Prevents that the first round, whose rows can be checked, is refused with the second."""
    assert CompetitiveRounds(verifier="reasoning_gym", rounds=1).verify is not None
