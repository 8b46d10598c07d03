"""Rows of six public question sets, turned into prompt, completion and short answer.

Each function takes one row as its publisher stores it and returns `{"prompt", "completion", "answer"}`. Completions
end in one way, "The answer is X.", the same in training, in demonstrations and in evaluation; options are written as
lines "(A) ..."; a text never holds an empty line, because an empty line is what ends an answer in the recipes for
these sets.

This module does not know where rows come from, how a prompt is built around them, or how an answer is read back out of
a text (`hfkd.eval.answers`). It never fills in a missing answer: such a row is an error, since scoring it would make
every prediction wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

Row = Mapping[str, Any]

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_AQUA_OPTION = re.compile(r"\s*\(?\s*([A-Z])\s*\)\s*(.*)", re.DOTALL)
_NUMBER_TOKEN = re.compile(r"\d+\.\d+")


def _require(row: Row, columns: Sequence[str], name: str) -> None:
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise ValueError(
            f"format {name!r} needs the columns {', '.join(columns)}; this row has no {', '.join(missing)} "
            f"(it has: {', '.join(row) or 'nothing'}). "
            "Choose another `format`, or name the columns with `columns` instead of a format."
        )


def _no_empty_lines(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _answered(rationale: str, stated: str) -> str:
    reasons = _no_empty_lines(rationale)
    if reasons and reasons[-1] not in ".!?:":
        reasons += "."
    return f"{reasons} The answer is {stated}.".strip()


def _number(value: Any) -> str:
    """A number without thousands commas and without a decimal part of zero: `"8.0"` and `8` give `"8"`."""
    text = str(value).strip().replace(",", "").removeprefix("$").removesuffix(".")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    if not number.is_finite():
        return text
    plain = format(number, "f")
    return (plain.rstrip("0").rstrip(".") if "." in plain else plain) or "0"


def _with_options(question: str, options: Sequence[str]) -> str:
    lines = [f"({chr(ord('A') + place)}) {_one_line(option)}" for place, option in enumerate(options)]
    return "\n".join([_no_empty_lines(question), *lines])


def _place_of_key(labels: Sequence[str], key: Any, name: str, hint: str = "") -> int:
    text = str(key).strip()
    if not text:
        raise ValueError(f"this row of {name!r} has an empty answer key; expected one of {', '.join(labels)}.{hint}")
    if text not in labels:
        raise ValueError(
            f"this row of {name!r} has the answer key {text!r}; expected one of its labels {', '.join(labels)}.{hint}"
        )
    return list(labels).index(text)


def gsm8k(row: Row) -> dict[str, str]:
    """GSM8K (`openai/gsm8k`): `question`, and `answer` as a rationale that ends in `#### 42`.

    The calculator marks `<<48/2=24>>` are taken out: they would teach a notation that no demonstration uses.

    Raises:
        ValueError: if a column is missing or the answer has no `####` with something behind it.
    """
    _require(row, ("question", "answer"), "gsm8k")
    rationale, mark, final = str(row["answer"]).rpartition("####")
    if not mark or not final.strip():
        raise ValueError(
            f"format 'gsm8k' expects an answer that ends in '#### <number>'; got {str(row['answer'])[-60:]!r}."
        )
    answer = _number(final)
    completion = _answered(_CALCULATOR_MARK.sub("", rationale), answer)
    return {"prompt": _no_empty_lines(str(row["question"])), "completion": completion, "answer": answer}


def _choices(row: Row, name: str, hint: str) -> dict[str, str]:
    _require(row, ("question", "choices"), name)
    choices = row["choices"]
    if not isinstance(choices, Mapping) or not {"text", "label"} <= set(choices):
        raise ValueError(f"format {name!r} expects `choices` with the lists `text` and `label`; got {choices!r}.")
    texts, labels = list(choices["text"]), [str(label).strip() for label in choices["label"]]
    if not texts or len(texts) != len(labels):
        raise ValueError(
            f"format {name!r} expects one label for each choice; got {len(texts)} texts and {len(labels)} labels."
        )
    key = row.get("answerKey")
    place = _place_of_key(labels, "" if key is None else key, name, hint)
    letter = chr(ord("A") + place)
    return {
        "prompt": _with_options(str(row["question"]), texts),
        "completion": f"The answer is ({letter}).",
        "answer": letter,
    }


def arc(row: Row) -> dict[str, str]:
    """ARC (`allenai/ai2_arc`): `question`, `choices` with `text` and `label`, `answerKey`.

    Some rows label their options 1 to 4. Options are lettered by their place, so that every row asks for a letter.

    Raises:
        ValueError: if a column is missing, labels and texts differ in number, or the key is empty or not a label.
    """
    return _choices(row, "arc", "")


def commonsense_qa(row: Row) -> dict[str, str]:
    """CommonsenseQA (`tau/commonsense_qa`): as ARC, with five options. Its test split is published without keys.

    Raises:
        ValueError: if a column is missing, labels and texts differ in number, or the key is empty or not a label.
    """
    return _choices(row, "commonsense_qa", " The test split is published without keys: use `split: validation`.")


def aqua_rat(row: Row) -> dict[str, str]:
    """AQuA-RAT (`deepmind/aqua_rat`): `question`, `options` as a list of `"A)21"`, `rationale`, `correct` as a letter.

    Raises:
        ValueError: if a column is missing, an option has no letter, or `correct` names none of the options.
    """
    _require(row, ("question", "options", "correct"), "aqua_rat")
    labels, texts = [], []
    for option in row["options"]:
        parts = _AQUA_OPTION.fullmatch(str(option))
        if parts is None:
            raise ValueError(f"format 'aqua_rat' expects options written as 'A)21'; got {option!r}.")
        labels.append(parts[1])
        texts.append(parts[2])
    place = _place_of_key(labels, row["correct"], "aqua_rat")
    letter = chr(ord("A") + place)
    completion = _answered(str(row.get("rationale") or ""), f"({letter})")
    return {"prompt": _with_options(str(row["question"]), texts), "completion": completion, "answer": letter}


def svamp(row: Row) -> dict[str, str]:
    """SVAMP (`ChilleD/SVAMP`): `Body`, `Question`, `Answer`, and `Equation` as the only rationale there is.

    Raises:
        ValueError: if `Body`, `Question` or `Answer` is missing, or the answer is empty.
    """
    _require(row, ("Body", "Question", "Answer"), "svamp")
    answer = _number(row["Answer"])
    if not answer.strip():
        raise ValueError("this row of 'svamp' has an empty `Answer`; expected a number.")
    equation = _NUMBER_TOKEN.sub(lambda hit: _number(hit[0]), _one_line(str(row.get("Equation") or "")))
    if equation.startswith("( ") and equation.endswith(" )") and equation.count("(") == 1:
        equation = equation[2:-2]
    rationale = f"{equation} = {answer}." if equation else ""
    prompt = _one_line(f"{row['Body']} {row['Question']}")
    return {"prompt": prompt, "completion": _answered(rationale, answer), "answer": answer}


def coin_flip(row: Row) -> dict[str, str]:
    """Coin flip (`skrishna/coin_flip`): `inputs` as "Q: A coin is heads up. ...?", `targets` as yes or no.

    Raises:
        ValueError: if a column is missing or the target is neither yes nor no.
    """
    _require(row, ("inputs", "targets"), "coin_flip")
    target = str(row["targets"]).strip().rstrip(".").casefold()
    if target not in ("yes", "no"):
        raise ValueError(f"format 'coin_flip' expects the target yes or no; got {row['targets']!r}.")
    question = re.sub(r"^Q(?:uestion)?:\s*", "", _one_line(str(row["inputs"])))
    question = re.sub(r"\s*A(?:nswer)?:$", "", question)
    return {"prompt": question, "completion": f"The answer is {target}.", "answer": target}


FORMATS: dict[str, Callable[[Row], dict[str, str]]] = {
    "gsm8k": gsm8k,
    "arc": arc,
    "commonsense_qa": commonsense_qa,
    "aqua_rat": aqua_rat,
    "svamp": svamp,
    "coin_flip": coin_flip,
}
