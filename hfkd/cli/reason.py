"""`hfkd reason`: ask the adapters of a run together until two ways agree on an answer. It trains nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hfkd.cli.errors import user_errors, visible
from hfkd.cli.reading import read_recipe


def reason(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run of a recipe with adapters.")],
    question: Annotated[str | None, typer.Argument(help="What is asked; or give --rows.")] = None,
    rows: Annotated[str | None, typer.Option("--rows", help="A file with question, and answer if known.")] = None,
    size: Annotated[int | None, typer.Option("--size", min=1, help="So many of the rows.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="At most so many.")] = 20,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="Of the texts.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens with this share.")] = 0.9,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of each text.")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts that are written together.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    extract: Annotated[
        str | None, typer.Option("--extract", help="text, last_number, gsm8k, choice or yes_no; else the recipe's.")
    ] = None,
    intuitive: Annotated[str, typer.Option("--intuitive", help="The adapter that answers at once.")] = "intuitive",
    knowledge: Annotated[str, typer.Option("--knowledge", help="The adapter that writes the rules.")] = "knowledge",
    deep: Annotated[str, typer.Option("--deep", help="The adapter that answers with these rules.")] = "deep",
    model: Annotated[str | None, typer.Option("--model", help="The base, if it lies elsewhere by now.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write every text and answer to this file.")] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Ask RUN's adapters QUESTION, by intuition and by knowledge, round by round until both give one answer."""
    with user_errors(traceback):
        _check(question, rows, size, json)

        from hfkd.cli.quiet import quiet_libraries
        from hfkd.rollout.base import GenerationSettings
        from hfkd.run.reasoning import Asking, read_questions
        from hfkd.run.reasoning import reason as ask

        quiet_libraries()
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_size=batch_size, seed=seed
        )
        asking = Asking(intuitive, knowledge, deep, rounds, extract, model, settings)
        asked = [{"prompt": question}] if rows is None else read_questions(rows, size)
        told = ask(run, asked, asking, read=read_recipe, json_path=json)
        lines = question_lines(told["outcomes"][0]) if rows is None else summary_lines(told["summary"])
        for line in lines:
            typer.echo(visible(line))


def question_lines(outcome: Mapping[str, Any]) -> list[str]:
    """The last round's texts, and what came of it."""
    last, count = outcome["rounds"][-1], len(outcome["rounds"])
    lines = [
        f"Intuitive   {' '.join(last['intuitive'].split())}",
        f"Knowledge   {' '.join(last['knowledge'].split())}",
        f"Deep        {' '.join(last['deep'].split())}",
    ]
    if outcome["agreed"]:
        return [*lines, f"Answer      {outcome['answer']} (agreed on in round {count})"]
    whose = "no text states one" if outcome["answer"] is None else "the most frequent one, not agreed on"
    return [*lines, f"Answer      {outcome['answer'] or 'none'} ({whose}, after round {count})"]


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """What many questions came to."""
    rounds, top = found["rounds"], found["most_frequent"]
    counts = ", ".join(f"{count} in {length}" for length, count in rounds["histogram"].items())
    lines = [
        f"Questions   {found['questions']}, {found['agreed']:.1%} agreed on",
        f"Rounds      {rounds['mean']:.2f} on average ({counts}); {found['texts']:.1f} texts a question, "
        f"{found['cut']:.1%} of them cut",
        f"Most given  {top['answer'] or 'none'}, to {top['share']:.1%} of the questions",
    ]
    if "accuracy" not in found:
        return lines
    low, high = found["interval"]
    shares = {"agreed on": found["accuracy_agreed"], "not agreed on": found["accuracy_not_agreed"]}
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share is not None)
    return [
        *lines,
        f"Accuracy    {found['accuracy']:.1%} of {found['graded']} ({low:.1%} to {high:.1%}); {parts}",
        f"Beside it   first intuitive text {found['first_intuitive']:.1%}, first deep text {found['first_deep']:.1%}, "
        f"any common answer right {found['any_common']:.1%}",
    ]


def _check(question: str | None, rows: str | None, size: int | None, json: Path | None) -> None:
    """Refuse what could only fail after minutes.

    Raises:
        ValueError: Not exactly one of a question and a file is given, or the question is empty.
        OSError: The file for the result can't be written.
    """
    if (question is None) == (rows is None):
        got = "neither" if question is None else "both"
        raise ValueError(f"expected a question or --rows FILE, got {got}")
    if question is not None and not question.strip():
        raise ValueError("the question is empty; expected a text")
    if size is not None and rows is None:
        raise ValueError("--size says how many rows are asked, and --rows isn't given")
    if json is not None:
        from hfkd.files import try_folder

        if json.is_dir():
            raise IsADirectoryError(f"--json: {json} is a folder; expected a file to write the result to")
        try_folder(json.absolute().parent)
