"""How to load a model and how to make it again, as code that runs as it stands once the id is filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from hfkd.card.markdown import Markdown, block, code, one_line
from hfkd.card.reading import count, section, text, value
from hfkd.card.teaching import demonstrations
from hfkd.card.words import base_id, is_adapter, is_part, origin

_TRUST = ", trust_remote_code=True"
_CODE = "# trust_remote_code runs Python that comes with the model: read it before you do.\n"
_QUIET = (("hub.push", False), ("training.push_to_hub", False), ("training.run_policy", "refuse"))
_QUIET += (("training.report_to", "none"), ("training.resume_from_checkpoint", None))
_PINNED = (
    ("student", "student", "model"),
    ("teacher", "teacher", "model"),
    ("data.train", "train", "path"),
    ("evaluation", "evaluation", "path"),
)
_WHERE = 'where = "."  # this folder, or its id on the hub\n'
_BASE = "THE-BASE-MODEL"


def loading_code(run: Mapping[str, Any]) -> Markdown:
    """Loading as it was saved: the whole model, or an adapter on the very base that it was trained on."""
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    trust = _trust(run)
    model = f"model = AutoModelForCausalLM.from_pretrained(where{trust})"
    if is_adapter(run):
        imports = f"from peft import PeftModel\n{imports}"
        imports = f"from pathlib import Path\n\n{imports}" if is_part(run) else imports
        model = f"{_base(run)}\nmodel = PeftModel.from_pretrained(base, where)"
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained(where{trust})"
    return block(f"{imports}\n{_CODE if trust else ''}{_WHERE}{tokenizer}\n{model}", "python")


def _trust(run: Mapping[str, Any]) -> str:
    """What models with code of their own can't be loaded without."""
    return _TRUST if section(run, "recipe.student").get("trust_remote_code") is True else ""


def _base(run: Mapping[str, Any]) -> str:
    if is_part(run):
        return (
            'beside = Path(where, "base")  # on the hub it is a repository of its own\n'
            'base = AutoModelForCausalLM.from_pretrained(beside if beside.is_dir() else f"{where}-base"'
            f"{_trust(run)})"
        )
    name = one_line(base_id(run) or origin(run) or _BASE)
    revision = text(run, "origins.student.revision") or text(run, "recipe.student.revision")
    pinned = f", revision={_quoted(revision)}" if revision and base_id(run) else ""
    local = "" if base_id(run) else "  # a folder of the machine that trained it"
    return f"base = AutoModelForCausalLM.from_pretrained({_quoted(name)}{pinned}{_trust(run)}){local}"


def loading_words(run: Mapping[str, Any]) -> Markdown:
    """What has to be known of the base of an adapter; empty for a whole model."""
    if not is_adapter(run):
        return Markdown("")
    if is_part(run):
        return Markdown(
            f"The adapter was trained on a part of {code(origin(run))}, which lies in `base/` beside it (on the "
            "hub in a repository of its own, named like this one with `-base`). On the whole model it is another "
            "adapter."
        )
    if not base_id(run):
        return Markdown(
            f"The adapter was trained on a local folder, {code(origin(run) or 'not recorded')}, and the id of that "
            "model isn't recorded: **TO FILL IN**, here and in `adapter_config.json`."
        )
    return Markdown("")


def merging_code(run: Mapping[str, Any]) -> Markdown:
    """The adapter merged into its base, as one model without PEFT; empty for a whole model."""
    if not is_adapter(run):
        return Markdown("")
    lines = (
        "merged = model.merge_and_unload()",
        'merged.save_pretrained("merged")',
        'tokenizer.save_pretrained("merged")',
        f'model = AutoModelForCausalLM.from_pretrained("merged"{_trust(run)})',
    )
    return block("\n".join(lines), "python")


def asking_words(run: Mapping[str, Any]) -> str:
    """In which form it is asked: a student that never saw a question alone is asked with worked examples."""
    if not (shown := _always_shown(run)):
        return "Asked in the form that it was trained on:"
    return (
        f"Asked in the form that it was trained on, with {demonstrations(shown)} before the question; put worked "
        "examples of your own there:"
    )


def _always_shown(run: Mapping[str, Any]) -> int:
    """The fewest demonstrations that the student ever read."""
    shots = value(run, "recipe.data.student_shots")
    numbers = [one for one in shots if isinstance(one, int)] if isinstance(shots, list) else []
    return max(0, min(numbers, default=0))


def asking_code(run: Mapping[str, Any]) -> Markdown:
    """A question in the very form that the model was trained on; empty where a function of the user's own made it."""
    style = section(run, "recipe.data.prompt")
    if not style or style.get("builder"):
        return Markdown("")
    longest = count(run, "recipe.evaluation.max_new_tokens") or count(run, "recipe.data.generation.max_new_tokens", 32)
    shown = min(_always_shown(run), 1000)
    examples = f'shown = [("A QUESTION", "ITS ANSWER")] * {shown}\n' if shown else ""
    ask = examples + (_chat if text(style, "style") == "chat" else _text)(style, bool(shown))
    stops = value(style, "stop")
    stop = json.dumps(stops) if isinstance(stops, list) and stops and text(style, "style") != "chat" else ""
    rest = f", stop_strings={stop}, tokenizer=tokenizer" if stop else ""
    answer = (
        f"output = model.generate(**inputs, max_new_tokens={longest}, do_sample=False{rest})\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )
    return block(f"{ask}\n{answer}", "python")


def _chat(style: Mapping[str, Any], shown: bool) -> str:
    """The messages."""
    system = text(style, "system")
    first = f'{{"role": "system", "content": {_quoted(system)}}}, ' if system else ""
    if shown:
        first += (
            '*({"role": role, "content": said} for pair in shown for role, said in zip(("user", "assistant"), pair)), '
        )
    return (
        f'messages = [{first}{{"role": "user", "content": "YOUR QUESTION"}}]\n'
        "inputs = tokenizer.apply_chat_template("
        'messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
    )


def _text(style: Mapping[str, Any], shown: bool) -> str:
    """The prompt by its templates."""
    question, answer = _quoted(text(style, "question", "{prompt}")), _quoted(text(style, "answer", "{completion}"))
    system = text(style, "system")
    prompt = f'{question}.replace("{{prompt}}", "YOUR QUESTION")'
    if shown:
        between = style.get("separator")
        ends = f" + {_quoted(between)}" if isinstance(between, str) and between else ""
        prompt = (
            f'"".join(\n    {question}.replace("{{prompt}}", asked) + {answer}.replace("{{completion}}", said){ends}\n'
            f"    for asked, said in shown\n) + {prompt}"
        )
    before = _quoted(f"{system}\n\n") + " + " if system else ""
    return f'prompt = {before}{prompt}\ninputs = tokenizer(prompt, return_tensors="pt")'


def reproducing(run: Mapping[str, Any], files: Collection[str]) -> Markdown:
    """One command that makes the model again, and what it needs."""
    parts = []
    command = value(run, "command")
    if isinstance(command, list) and command:
        parts.append(f"This run was started with {code(' '.join(shell_word(str(part)) for part in command))}.")
    if "recipe.yaml" in files or section(run, "recipe"):
        parts.append(
            "The whole recipe, defaults included, is `recipe.yaml` beside this card. Its paths are those of the "
            "folder in which the run was started; there:"
        )
        folder = one_line(text(run, "recipe.training.output_dir", "THE-OUTPUT-FOLDER"))
        asked = ["training.output_dir=outputs/again", *_quietly(run)]
        again = " ".join(shell_word(one) for one in ("hfkd", "train", folder.rstrip("/") + "/recipe.yaml", *asked))
        parts.append(block(again, "sh"))
    return Markdown("\n\n".join(parts) or "The recipe isn't recorded, so it can't be made again from this.")


def _quietly(run: Mapping[str, Any]) -> list[str]:
    """What keeps a second run from publishing over the first one, from joining another, and from telling a tracker;
    and the revisions that were taken of the hub, where the recipe names none.
    """
    changes = []
    for key, wanted in _QUIET:
        found = value(run, f"recipe.{key}")
        if found is not None and found != wanted:
            changes.append(f"{key}={json.dumps(wanted) if not isinstance(wanted, str) else wanted}")
    for key, part, name_key in _PINNED:
        known, asked = section(run, f"origins.{part}"), section(run, f"recipe.{key}")
        revision = text(known, "revision")
        name = text(asked, name_key) or text(asked, "init.from")
        same = text(known, "source") == "hub" and text(known, "id") == name
        if re.fullmatch(r"[\w./-]+", revision) and same and revision != text(asked, "revision"):
            changes.append(f"{key}.revision={revision}")
    return changes


def shell_word(part: str) -> str:
    """A part of a command line as a shell reads it."""
    return part if re.fullmatch(r"[\w./:=,@+~-]+", part) else "'" + part.replace("'", "'\\''") + "'"


def _quoted(words: str) -> str:
    """A text as a literal of Python, in one line."""
    return json.dumps(words)
