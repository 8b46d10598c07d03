"""What recipes and rows hold is put on a card as words: it can't become metadata, HTML, a link or a table's cell."""

from __future__ import annotations

import copy
import json
import re

import pytest
from card_rules import faults, metadata_of
from huggingface_hub import ModelCard
from reports import whole_report, whole_run

from hfkd.card import build_card
from hfkd.card.markdown import block, code, code_cell, plain, table

NASTY = (
    'x"\n---\nlicense: mit',
    "---\nlicense: mit\n---",
    "| a | b |\n|---|---|",
    "`rm -rf` ``` \n```\n# Title",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![](http://example.org/x.png)",
    "{{ 7 * 7 }}{% raw %}",
    "\\| \\` \\[ *bold* _it_ ~~s~~ $x$",
    "!!python/object:os.system",
    "\u202egnp.exe\x1b[2J\x00",
    "a: b # c\n- d",
    "-->\n<!-- hfkd card sha256:" + "0" * 64 + " -->",
)


def strings(data: object, path: tuple = ()) -> list[tuple]:
    """The paths of all texts in plain data."""
    if isinstance(data, dict):
        return [one for key, item in data.items() for one in strings(item, (*path, key))]
    if isinstance(data, list):
        return [one for place, item in enumerate(data) for one in strings(item, (*path, place))]
    return [path] if isinstance(data, str) else []


def put(data: object, path: tuple, text: str) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = text


@pytest.mark.parametrize("nasty", NASTY)
def test_no_text_of_a_record_breaks_the_card(nasty: str) -> None:
    """One question of a data set could give a model another licence, or run a script in a reader's browser."""
    run, report = copy.deepcopy(whole_run()), copy.deepcopy(whole_report())
    run["student"] = {"source": "hub"}
    for data in (run, report):
        for path in strings(data):
            if path[-1] not in ("kind", "source", "schedule"):
                put(data, path, nasty)
    text = build_card(run, report)
    assert not faults(text)
    data = metadata_of(text)
    assert set(data) <= {"library_name", "metrics", "pipeline_tag", "tags", "model-index", "license", "license_name"}
    assert data.get("license") in (None, "other")
    body = without_code(ModelCard(text).text)
    assert not re.search(r"<(?!https://|!-- hfkd card)", body), "HTML"
    assert not re.search(r"(?<!\\)\]\((?!plots/)", body), "a link"
    assert "49" not in re.findall(r"distilled on .*", text)[0]
    assert not re.search(r"^(# Title|license: mit)", body, re.MULTILINE)
    assert "\x1b" not in text and "\x00" not in text and "\u202e" not in text
    assert len(re.findall(r"^# ", body, re.MULTILINE)) == 1


def without_code(text: str) -> str:
    """The card without blocks and pieces of code, in which nothing is Markdown."""
    text = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def test_one_name_that_ends_the_metadata() -> None:
    """The very case: a model whose name closes the block would put what follows at the top of the page."""
    run = {"recipe": {"student": {"model": 'x"\n---'}}, "student": {"source": "hub"}}
    text = build_card(run, whole_report())
    assert "base_model" not in metadata_of(text)
    assert metadata_of(text)["model-index"][0]["name"] == 'x" ---, distilled'
    assert text.count("\n---\n") == 1


@pytest.mark.parametrize(
    "value", [None, 3, True, [], ["x"], {}, {"x": 1}, "words", float("nan"), float("inf"), -1, 1e400]
)
def test_no_value_of_another_kind_breaks_the_card(value: object) -> None:
    """Records are edited, cut and written by other versions; a card is made of what is left."""
    run = whole_run()
    run["student"] = {"source": "hub", "kept_layers": [0], "layers_before": 2, "narrowed": {"heads": {"of": 2}}}
    whole = {"run": run, "report": {**whole_report(), "loss_history": whole_report()["loss_history"][:2]}}
    paths = [path for path in every(whole) if len(path) > 1]
    for place in range(4):  # several together, so that it is quick, but none within another
        for depth in sorted({len(path) for path in paths}):
            changed = copy.deepcopy(whole)
            for path in [path for path in paths if len(path) == depth][place::4]:
                put(changed, path, copy.deepcopy(value))
            text = build_card(changed["run"], changed["report"])
            assert "nan%" not in text and "inf%" not in text
            assert metadata_of(text)["library_name"] in ("peft", "transformers")


def every(data: object, path: tuple = (), depth: int = 5) -> list[tuple]:
    """Paths of nested mappings, as deep as that."""
    if not isinstance(data, dict) or not depth:
        return []
    return [one for key, item in data.items() for one in [(*path, key), *every(item, (*path, key), depth - 1)]]


def test_secrets_and_folders_stay_at_home(tmp_path) -> None:
    """What was typed on a command line is public with the card."""
    token = "hf_" + "a1B2" * 8
    run = copy.deepcopy(whole_run())
    run["command"] = ["hfkd", "train", "r.yaml", f"student.load_kwargs.token={token}", f"--token {token}"]
    run["recipe"]["student"]["model"] = str(tmp_path / "model")
    run["recipe"]["training"]["output_dir"] = str(tmp_path)
    text = build_card(run, whole_report())
    assert token not in text and str(tmp_path.parent) not in text


def test_pieces_of_markdown() -> None:
    """Each piece by itself: what a reader sees is what was there."""
    assert plain("a|b\n<c> *d* x_y _e_") == "a\\|b &lt;c&gt; \\*d\\* x_y \\_e\\_"
    assert code("a`b") == "``a`b``" and code("`") == "`` ` ``" and code("a || b") == "`a || b`"
    assert code_cell("a|b") == "a\\|b" and code_cell("ab") == "`ab`"
    assert code("") == "(empty)"
    assert block("```\nx", "sh") == "````sh\n```\nx\n````"
    assert table(("a", "b"), [("x|y", 1)]) == "| a | b |\n|---|---|\n| x\\|y | 1 |"
    assert table(("a",), []) == ""
    assert len(plain("x" * 10_000)) == 2000


def test_a_template_is_no_template_inside_of_values() -> None:
    """A recipe's prompt is full of braces."""
    run = {"recipe": {"data": {"train": {"path": "{{ 7 * 7 }}"}, "prompt": {"question": "{{ 7 * 7 }} {prompt}"}}}}
    text = build_card(run, {})
    assert "{{ 7 * 7 }}" in text and "49" not in text.split("<!-- hfkd")[0]
    assert json.dumps("{{ 7 * 7 }} {prompt}") in text
