"""Rounds of a contest: the student answers, the teacher grades, and of what was hard for the student the teacher makes
new questions and answers them.

Knows prompts, answers and grades. The student is the same in all rounds: nothing is trained here.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from numbers import Real
from typing import Any

from hfkd.data.messages import completion_text, prompt_key
from hfkd.data.verify import as_verifier
from hfkd.transforms.base import Row, RowTransform, Workshop
from hfkd.transforms.texts import STUDENT, TEACHER, check_writer, labelled, prompts_of, written

GRADE = (
    "Question: {prompt}\nA right answer: {reference}\nAn answer to grade: {answer}\n"
    "How good is the answer to grade, from 0 (wrong) to 10 (right)? Reply with the number alone."
)
REWRITE = (
    "Question: {prompt}\nWrite one new question of the same kind that is as hard, about something else. Reply with "
    "the new question alone."
)
_BEST = 10.0
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w|\.\d)")
_SCALE = re.compile(r"\b0\s*(?:\(\w+\)\s*)?(?:to|-|–)\s*10\b|(?:/|\bout of\b|\bof\b)\s*10\b", re.IGNORECASE)
_MARKS = " \"'`*_“”"


class CompetitiveRounds(RowTransform):
    """Adds questions like those that the student fails on, each answered by the teacher.

    In each round the student answers greedily, first the training rows and then what the round before has made. Each
    answer is graded against the row's own (its completion, else its `answer`). Of a hard question the teacher writes a
    new one; those that are empty, or were there before (held-out rows and demonstrations count), are left out and
    counted. A question was there before also if it stands behind a colon or in a line by itself.

    Args:
        rounds: How many, at least 1; it ends before where nothing is hard.
        hard_below: A question is hard if its answer has a grade below this, from 0 to 1.
        most: The most hard questions of a round that are written anew, the lowest grades first; null takes all.
        verifier: Grades in place of the teacher (see `hfkd.data.verify`); it must be one that needs no more of a row
            than prompt and `answer`, because a new question has nothing else. `reasoning_gym` does, and is for one
            round.
        grade_prompt: What the teacher is asked for a grade, with `{prompt}`, `{reference}` and `{answer}`; the one
            number of its reply counts, from 0 to 10.
        rewrite_prompt: What it is asked for a new question, with `{prompt}`; what stands before that in its line is
            taken off the reply.
        temperature: Of the new questions; grades and answers are greedy.
        max_new_tokens: Of a new question.

    Raises:
        ValueError: A setting is outside its limits, or there is no such verifier, or it can't judge a second round.

    Paper:
        Li et al. (CoMD), 2023, https://arxiv.org/abs/2311.08213: four rounds of answering, grading, writing anew, and
        training, on images with text. Here there are texts alone, and the student isn't trained between the rounds of
        one run: start the next run from the student of the last one for that. The prompts are ours.
    """

    needs_teacher = True

    def __init__(
        self,
        rounds: int = 2,
        hard_below: float = 0.5,
        most: int | None = None,
        verifier: str | None = None,
        grade_prompt: str = GRADE,
        rewrite_prompt: str = REWRITE,
        temperature: float = 0.7,
        max_new_tokens: int = 96,
    ) -> None:
        counts = {"rounds": rounds, "max_new_tokens": max_new_tokens, **({} if most is None else {"most": most})}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1.")
        for name, value, top in (("hard_below", hard_below, 1), ("temperature", temperature, float("inf"))):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= top:
                raise ValueError(f"{name} is {value!r}; expected a number from 0 to {top}.")
        if hard_below == 0:
            raise ValueError("hard_below is 0, and no grade is below it: nothing would be hard. Set it above 0.")
        _check_fields("grade_prompt", grade_prompt, {"prompt", "reference", "answer"})
        _check_fields("rewrite_prompt", rewrite_prompt, {"prompt"})
        if verifier == "reasoning_gym" and rounds > 1:
            raise ValueError(
                f"verifier is reasoning_gym and rounds is {rounds}; its checkers read the row's `verification`, and "
                "new questions have a prompt and an `answer` alone. Set rounds to 1, leave verifier out, or take "
                "exact, contains, or a function of yours that reads no more than these."
            )
        self.verify = None if verifier is None else as_verifier(verifier)
        self.rounds, self.hard_below, self.most = rounds, float(hard_below), most
        self.grade_prompt, self.rewrite_prompt = grade_prompt, rewrite_prompt
        self.temperature, self.max_new_tokens = float(temperature), max_new_tokens
        self._told: list[dict[str, int]] = []

    def apply(self, rows: Sequence[Row], workshop: Workshop) -> list[Row]:
        """Return the given rows, and behind them the new ones.

        Raises:
            ValueError: A prompt isn't plain text, a row has no answer, or there is no model that could write.
            VerifierError: The verifier fails, or gives no number from 0 to 1; names the row.
        """
        check_writer(workshop, STUDENT, "rounds")
        check_writer(workshop, TEACHER, "rounds")
        for number, row in enumerate(rows):
            if not isinstance(row.get("prompt"), str):
                raise ValueError(
                    f"rounds: row {number} has no prompt in plain text, and only that can be written anew. Map a "
                    "column of texts to prompt, or leave this transform out."
                )
        known = {prompt_key(row).strip(_MARKS) for row in (*rows, *workshop.held_out, *workshop.demonstrations)}
        made, self._told = labelled(rows, workshop, "rounds"), []
        pool = list(made)
        for number in range(1, self.rounds + 1):
            pool = self._round(number, pool, known, workshop)
            made += pool
            if not pool:
                break
        return made

    def describe(self) -> dict[str, Any]:
        """For each round, numbers of answers graded, without a grade, hard, and of new rows and those left out."""
        return {"rounds": list(self._told)}

    def _round(self, number: int, pool: Sequence[Row], known: set[str], workshop: Workshop) -> list[Row]:
        """New rows out of those that were hard; `known` grows by them."""
        grades = self._grades(number, pool, workshop)
        hard = [place for place, grade in enumerate(grades) if grade is not None and grade < self.hard_below]
        hard = sorted(hard, key=lambda place: grades[place])[: self.most]
        asked = [self.rewrite_prompt.format(prompt=pool[place]["prompt"]) for place in sorted(hard)]
        options = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        replies = self._ask(workshop, asked, f"rounds_{number}_questions", number, **options)
        texts = [self._question(reply, workshop) for reply in replies]
        fresh = []
        for text in texts:
            keys = _asked_in(text)
            if keys and known.isdisjoint(keys):
                known.add(keys[0])
                fresh.append({"prompt": text})
        answers = written(
            workshop, TEACHER, prompts_of(workshop, TEACHER, fresh), f"rounds_{number}_answers", temperature=0.0
        )
        pairs = zip(fresh, answers, strict=True)
        new = [workshop.builder.with_answer(row, answer) for row, answer in pairs if answer]
        new = [row for row in new if completion_text(row)]
        self._told.append(
            {
                "answered": len(pool),
                "without_grade": sum(grade is None for grade in grades),
                "hard": len(hard),
                "new": len(new),
                "empty": sum(not text for text in texts) + len(fresh) - len(new),
                "known_before": sum(bool(text) for text in texts) - len(fresh),
            }
        )
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self._told[-1].items())
        workshop.say(f"rounds: round {number}: {said}.")
        return new

    def _question(self, reply: str, workshop: Workshop) -> str:
        """A reply without the words that the prompts have around a question, which teachers like to repeat."""
        text, question = reply.strip(), workshop.builder.style.question
        for template in (self.rewrite_prompt, question):
            label = template.partition("{prompt}")[0].rpartition("\n")[2].strip()
            if label:
                text = re.sub(rf"^{re.escape(label)}(?!(?<=\w)\w)", "", text, flags=re.IGNORECASE).strip()
        after = question.partition("{prompt}")[2].strip()
        return text.partition(f"\n{after}")[0].removesuffix(after).strip() if after else text

    def _grades(self, number: int, pool: Sequence[Row], workshop: Workshop) -> list[float | None]:
        """What each answer of the student is worth, from 0 to 1; None where the teacher gave no number."""
        prompts = prompts_of(workshop, STUDENT, pool)
        texts = written(workshop, STUDENT, prompts, f"rounds_{number}_student", temperature=0.0)
        answered = [workshop.builder.with_answer(row, text) for row, text in zip(pool, texts, strict=True)]
        if self.verify is not None:
            return [self.verify(row, completion_text(row)) for row in answered]
        asked = [
            self.grade_prompt.format(
                prompt=row["prompt"], reference=completion_text(row), answer=completion_text(student)
            )
            for row, student in zip(pool, answered, strict=True)
        ]
        replies = self._ask(workshop, asked, f"rounds_{number}_grades", max_new_tokens=8, temperature=0.0)
        return [grade_of(reply) for reply in replies]

    def _ask(self, workshop: Workshop, asked: Sequence[str], name: str, draw: int = 0, **settings: Any) -> list[str]:
        """What the teacher replies to a request: through the chat template where there is one, else by the line."""
        chat, tokenizer = workshop.builder.chat, workshop.builder.tokenizer
        if tokenizer.chat_template:
            texts = [chat.render([{"role": "user", "content": text}], to_answer=True) for text in asked]
            prompts = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
            return written(workshop, TEACHER, prompts, name, draw, stop=(), **settings)
        prompts = [list(tokenizer(text + "\n")["input_ids"]) for text in asked]
        return written(workshop, TEACHER, prompts, name, draw, stop=("\n",), **settings)


def grade_of(reply: str) -> float | None:
    """The number of a reply, over ten; None where it isn't from 0 to 10, or there is another one beside it. What names
    the scale ("out of 10", "0 to 10") is no number of these.
    """
    numbers = [float(found) for found in _NUMBER.findall(_SCALE.sub(" ", reply))]
    return numbers[0] / _BEST if len(numbers) == 1 and 0 <= numbers[0] <= _BEST else None


def _asked_in(text: str) -> list[str]:
    """What a text may be asking, as prompts are compared: the whole first, then its lines, and what stands behind a
    colon. Empty where there is no text.
    """
    keys = []
    for piece in (text, *text.splitlines()):
        key = prompt_key({"prompt": piece})
        keys += [key, *(key[place + 1 :] for place, sign in enumerate(key) if sign == ":")]
    return [bare for key in keys if (bare := key.strip(_MARKS))]


def _check_fields(name: str, template: str, fields: set[str]) -> None:
    try:
        found = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is {template!r}, which is no template ({error}).") from None
    if found != fields:
        raise ValueError(
            f"{name} has the fields {sorted(found)}; expected {' and '.join(sorted(fields))}, each in braces, and a "
            "literal brace doubled."
        )
