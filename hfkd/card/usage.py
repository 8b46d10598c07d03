"""How to load a model and how to make it again, as code that runs as it stands once the id is filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from hfkd.card.markdown import Markdown, block, code, one_line
from hfkd.card.reading import count, section, text, value
from hfkd.card.words import base_id, is_adapter, is_part, origin

_WHERE = 'where = "."  # this folder, or its id on the hub\n'
_BASE = "THE-BASE-MODEL"


def loading_code(run: Mapping[str, Any]) -> Markdown:
    """Loading as it was saved: the whole model, or an adapter on the very base that it was trained on."""
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    model = "model = AutoModelForCausalLM.from_pretrained(where)"
    if is_adapter(run):
        imports = f"from peft import PeftModel\n{imports}"
        imports = f"from pathlib import Path\n\n{imports}" if is_part(run) else imports
        model = f"{_base(run)}\nmodel = PeftModel.from_pretrained(base, where)"
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(where)"
    return block(f"{imports}\n{_WHERE}{tokenizer}\n{model}", "python")


def _base(run: Mapping[str, Any]) -> str:
    if is_part(run):
        return (
            'beside = Path(where, "base")  # on the hub it is a repository of its own\n'
            'base = AutoModelForCausalLM.from_pretrained(beside if beside.is_dir() else f"{where}-base")'
        )
    name = one_line(base_id(run) or origin(run) or _BASE)
    revision = text(run, "origins.student.revision") or text(run, "recipe.student.revision")
    pinned = f", revision={_quoted(revision)}" if revision and base_id(run) else ""
    local = "" if base_id(run) else "  # a folder of the machine that trained it"
    return f"base = AutoModelForCausalLM.from_pretrained({_quoted(name)}{pinned}){local}"


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
        'model = AutoModelForCausalLM.from_pretrained("merged")',
    )
    return block("\n".join(lines), "python")


def asking_code(run: Mapping[str, Any]) -> Markdown:
    """A question in the very form that the model was trained on; empty where a function of the user's own made it."""
    style = section(run, "recipe.data.prompt")
    if not style or style.get("builder"):
        return Markdown("")
    longest = count(run, "recipe.evaluation.max_new_tokens") or count(run, "recipe.data.generation.max_new_tokens", 32)
    if text(style, "style") == "chat":
        system = text(style, "system")
        first = f'{{"role": "system", "content": {_quoted(system)}}}, ' if system else ""
        ask = (
            f'messages = [{first}{{"role": "user", "content": "YOUR QUESTION"}}]\n'
            "inputs = tokenizer.apply_chat_template("
            'messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        )
    else:
        question = _quoted(text(style, "question", "{prompt}"))
        ask = f'prompt = {question}.replace("{{prompt}}", "YOUR QUESTION")\n'
        ask += 'inputs = tokenizer(prompt, return_tensors="pt")'
    stops = value(style, "stop")
    stop = json.dumps(stops) if isinstance(stops, list) and stops and text(style, "style") != "chat" else ""
    rest = f", stop_strings={stop}, tokenizer=tokenizer" if stop else ""
    answer = (
        f"output = model.generate(**inputs, max_new_tokens={longest}, do_sample=False{rest})\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))'
    )
    return block(f"{ask}\n{answer}", "python")


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
        again = f"hfkd train {shell_word(folder.rstrip('/') + '/recipe.yaml')} training.output_dir=outputs/again"
        parts.append(block(again, "sh"))
    return Markdown("\n\n".join(parts) or "The recipe isn't recorded, so it can't be made again from this.")


def shell_word(part: str) -> str:
    """A part of a command line as a shell reads it."""
    return part if re.fullmatch(r"[\w./:=,@+~-]+", part) else "'" + part.replace("'", "'\\''") + "'"


def _quoted(words: str) -> str:
    """A text as a literal of Python, in one line."""
    return json.dumps(words)
