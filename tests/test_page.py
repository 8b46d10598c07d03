"""The HTML page of a run: all of the report, nothing of anybody else's making, and no request to anybody."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import pytest
from reports import details, whole_report, whole_run

from hfkd.report.page import build_page

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PICTURES = {
    f"plots/{name}.png": PIXEL for name in ("accuracy-plural", "accuracy", "loss", "reliability", "agreement", "mine")
}
VOID = {"meta", "link", "img", "br"}
PAYLOAD = (
    '</style></title></code></pre></details>{{ 7 * 7 }}<script>document.documentElement.id = "pwned"</script>'
    "<img src='http://localhost/x' onerror='document.title = 1'>\" onmouseover=\"x"
)


class Page(HTMLParser):
    """The elements of a page in their order, each with its attributes and the text in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append((tag, self.elements[-1][2]))

    def handle_endtag(self, tag):
        opened, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        for _, texts in self.open:
            texts.append(data)

    def of(self, tag: str) -> list[tuple[dict, str]]:
        """Attributes and text of each element of a kind."""
        return [(attributes, "".join(texts)) for name, attributes, texts in self.elements if name == tag]

    def values(self, name: str) -> list[str]:
        """What an attribute says, wherever it stands."""
        return [attributes[name] for _, attributes, _ in self.elements if name in attributes]

    @property
    def text(self) -> str:
        """All words of the body, with single spaces."""
        return " ".join(self.of("body")[0][1].split())


@pytest.fixture(scope="module")
def text() -> str:
    """A page with everything."""
    return build_page(whole_run(), whole_report(), PICTURES, "# The card\n")


@pytest.fixture(scope="module")
def page(text) -> Page:
    """The same, parsed."""
    return Page(text)


def poisoned(value, keys=True):
    """The same data with markup in every text; in every name too, where names are anybody's."""
    if isinstance(value, dict):
        ours = (
            "k_shot",
            "k_shot_details",
            "fidelity",
            "forgetting",
            "details",
            "student",
            "teacher",
            "origins",
            "recipe",
        )
        return {
            (name if name in ours or not keys else f"{name}{PAYLOAD}"): poisoned(item, keys and name in ours)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [poisoned(item, False) for item in value]
    return value + PAYLOAD if isinstance(value, str) else value


def hostile() -> tuple[dict, dict]:
    """A run and a report in which nothing can be believed to be a plain word."""
    run = poisoned(whole_run(), keys=False)
    for name in ("versions", "durations", "data", "recipe"):
        run[name] = {f"{key}{PAYLOAD}": item for key, item in run[name].items()} | run[name]
    report = poisoned(whole_report(), keys=False)
    for part in (report["k_shot_details"], report["fidelity"], report["forgetting"][0]["details"]):
        part |= {f"{stage}{PAYLOAD}": part[stage] for stage in list(part)}
    return run, report


def test_it_says_what_the_files_say(page):
    """Prevents a figure from being lost, or from standing under another model or number of demonstrations."""
    for words in (
        "SmolLM2-135M-Instruct, distilled on past_tense",
        "the student's own weights with the adapter switched off",
        "4,884,480 of 139,400,000 parameters",
        "sum_v p(v) (log p(v) - log q(v))",
        "temperature 2",
        "apache-2.0",
        "12fd25f77366",
        "1.17 Wh (4,210 J)",
        "cpu package 0",
        "80814b8970a27a8b",
        "37.8 s",
        "hfkd train recipes/secokd/past_tense.yaml training.max_steps=30",
        "per_device_train_batch_size: 8",
        "2.13.0+cpu",
        "# The card",
        "The logged loss was",
    ):
        assert words in page.text, words
    rows = re.findall(r"\d demonstration|\b[018] ((?:[\d.]+% [\d.]+% to [\d.]+% |– )+)2\.1%", page.text)
    eight = next(row for row in rows if row.startswith("89.6%"))
    assert re.sub(r" [\d.]+% to [\d.]+%", "", eight).split() == ["89.6%", "97.9%", "95.8%", "89.6%"]
    assert "89.6% 77.8% to 95.5%" in eight


def test_what_has_to_be_read_first_stands_first(page):
    """Prevents a table of accuracies from being read before one knows that a model collapsed or was cut."""
    warning, table = page.text.index("collapsed: gives no answer to 60%"), page.text.index("Accuracy on 48 held-out")
    assert page.text.index("Results", 100) < warning < table
    assert "7 of 48 answers were cut" in page.text[warning:table]


def test_the_fidelity_of_student_and_teacher(page):
    """Prevents a figure of the teacher from standing under the student, and one without its interval."""
    cells = page.text[page.text.index("How near the student is") :]
    assert re.search(r"Agreement tokens whose .*? 51\.2% 48\.2% to 53\.6% 89\.3% 86\.3% to 91\.7%", cells)
    assert re.search(r"where the teacher is wrong .*? – 71\.0%", cells)
    assert re.search(r"Forward KL .*? 2\.340 1\.872 to 2\.925 0\.210 0\.168 to 0\.263", cells)
    assert re.search(r"Mass on 64 tokens .*? 74\.4% 98\.1% 99\.2%", cells)
    assert re.search(r"Perplexity .*? 9\.400 1\.620 1\.480", cells)
    assert "␣walked ␣walked ␣walk 12 1.900 22.8" in cells and "↵ ↵ ␣walk 11" in cells
    assert "\u202e" not in page.text and "\\u202etxt" in cells


def test_pictures_are_in_the_page_and_in_their_places(page):
    """Prevents a page that is broken once it is sent to somebody, and a task's picture beside another's table."""
    pictures = page.of("img")
    assert len(pictures) == len(PICTURES) and all(len(image["alt"]) > 12 for image, _ in pictures)
    assert {image["src"] for image, _ in pictures} == {f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"}
    found = {name: {name: PIXEL} for name in ("accuracy.png", "accuracy-plural.png")}
    for name, picture in found.items():
        text = build_page(whole_run(), whole_report(), picture)
        of_other = text.index("<figure>") > text.index("not trained: plural")
        assert of_other == (name == "accuracy-plural.png")
    assert "<img" not in build_page(whole_run(), whole_report(), {"loss.png": b"<svg onload=alert(1)>"})


def test_it_needs_nothing_and_runs_nothing(text, page):
    """Prevents a page that asks a server for something, and so tells it who reads the report, or that has a script."""
    assert not page.of("script") and not page.of("iframe") and not page.of("object") and not page.of("base")
    for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
        for value in page.values(name):
            assert value.startswith(("data:image/png;base64,", "#")) or value == "data:,", value
    assert not any(name.startswith("on") or name == "style" for _, found, _ in page.elements for name in found)
    (style,) = page.of("style")
    assert "url(" not in style[1] and "@import" not in style[1]
    policy = next(each["content"] for each, _ in page.of("meta") if "http-equiv" in each)
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and f"style-src 'sha256-{digest}'" in policy
    assert text.startswith("<!DOCTYPE html>")


def test_markup_from_rows_and_recipes_is_only_words():
    """Prevents a row, a recipe, a task's name, an answer or a card of somebody else's from running in a reader's
    browser.
    """
    run, report = hostile()
    pictures = {f"other{PAYLOAD}.png": PIXEL, f"accuracy{PAYLOAD}.png": PIXEL}
    text = build_page(run, report, pictures, PAYLOAD)
    found = Page(text)
    assert not found.of("script") and len(found.of("img")) == 2 and len(found.of("style")) == 1
    assert not any(name.startswith("on") for _, attributes, _ in found.elements for name in attributes)
    plain = Page(build_page(whole_run(), whole_report(), {}, "card"))
    assert {tag for tag, _, _ in found.elements} - {"figure", "img"} <= {tag for tag, _, _ in plain.elements}
    assert text.count(html.escape("<script>document")) > 40 and "{{ 7 * 7 }}" in found.text
    assert "onmouseover" in found.of("title")[0][1]


@pytest.mark.parametrize("part", [*whole_run(), *whole_report()])
def test_whatever_is_missing_is_left_out(part):
    """Prevents one missing or torn part of the files from costing the whole page."""
    for instead in (None, [], {}, "torn", 3, [None, "x", {}], {"before": 3, "after": {"0": None}}):
        run, report = whole_run(), whole_report()
        (run if part in run else report)[part] = instead
        assert "Results" in Page(build_page(run, report, {})).text


def test_what_is_missing_is_said():
    """Prevents an empty section from looking like a result."""
    found = Page(build_page({}, {}, {}))
    for words in (
        "Whether the run was finished is not recorded.",
        "Student not recorded",
        "Energy not recorded",
        "The objective is not recorded.",
        "their licences, is not recorded.",
        "No question was asked",
        "Fidelity to the teacher It was not measured.",
        "No loss was logged.",
        "The recipe is not recorded.",
        "The versions are not recorded.",
        "There is no model card.",
    ):
        assert words in found.text, words
    why = {"fidelity": {"unavailable": "the teacher's cache holds samples"}}
    assert "It could not be measured: the teacher's cache holds samples" in Page(build_page({}, why, {})).text


def test_it_can_be_read_without_eyes(page):
    """Prevents tables whose cells have no heading, headings that skip a level, and links that lead nowhere."""
    for attributes, _ in page.of("th"):
        assert attributes.get("scope") in ("col", "row")
    assert len(page.of("caption")) == len(page.of("table")) >= 7
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = [link[1:] for link in page.values("href") if link.startswith("#")] + page.values("aria-labelledby")
    assert set(targets) <= set(ids) and len(page.of("main")) == 1 and page.of("html")[0][0]["lang"] == "en"
    for attributes, _ in page.of("div"):
        assert attributes["class"] != "scroll" or (attributes["tabindex"] == "0" and attributes["aria-label"])


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG defines it."""
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_words_can_be_seen_in_the_light_and_in_the_dark(page):
    """Prevents grey words on grey paper: every pair of colours has a contrast of at least 4.5."""
    palettes = [dict(re.findall(r"--([\w-]+): (#\w{6})", line)) for line in page.of("style")[0][1].splitlines()]
    light, dark, _ = [palette for palette in palettes if palette]
    pairs = [(ink, "paper") for ink in ("ink", "soft", "accent", "ok")]
    pairs += [("ink", "box"), ("soft", "box"), ("ink", "warn-box")]
    for palette in (light, dark):
        for ink, paper in pairs:
            low, high = sorted(luminance(palette[name]) for name in (ink, paper))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper, palette)
    assert luminance(light["paper"]) > 0.9 and luminance(dark["paper"]) < 0.05


def test_no_secret_and_no_folder_of_this_machine(tmp_path, monkeypatch):
    """Prevents a page that is sent around from telling a token or who made it, wherever in the files that stood; a
    token of the text stays one, though its key looks like that of a secret.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    run, report = whole_run(), whole_report()
    run["recipe"]["student"]["load_kwargs"] = {"token": "hf_abcdefghijklmnop"}
    run["command"].append(f"{tmp_path}/secret/run")
    report["k_shot_details"]["after"]["0"]["verdict"] = f"Bearer hf_qrstuvwxyzabcdef in {tmp_path}/x"
    text = build_page(run, report, {}, f"card of {tmp_path}/home with hf_0123456789abcdef")
    assert "hf_" not in text and str(tmp_path) not in text
    assert "␣walked" in text


def test_letters_that_have_no_bytes_dont_break_the_file():
    """Prevents half a letter in an answer, as a cut token leaves it, from an error when the page is written."""
    report = whole_report()
    report["fidelity"]["after"]["worst_tokens"][0]["text"] = "\ud83d"
    report["k_shot_details"] = details(after={0: 0.5})
    report["k_shot_details"]["after"]["0"]["verdict"] = "always '\udc00'"
    text = build_page(json.loads(json.dumps(whole_run())), report, {})
    assert text.encode("utf-8")


@pytest.mark.parametrize("status", ["started", "failed", None])
def test_a_run_that_is_not_finished_is_told_at_the_top(status):
    """Prevents the page of a killed run from reading like that of a finished one, with steps that nobody made."""
    run = whole_run()
    run["status"] = status
    found = Page(build_page(run, {"loss_history": []}, {}))
    assert found.text.index("This run ") < found.text.index("What was done")
    assert "up to 30 optimizer steps were asked for, and how many were made isn't recorded" in found.text
    assert "Steps 30 optimizer steps" not in found.text
    report = {"loss_history": [{"step": 8, "loss": 1.0}]}
    assert "Steps at least 8 optimizer steps of the 30" in Page(build_page(run, report, {})).text
    whole = Page(build_page(whole_run(), whole_report(), {})).text
    assert "Steps 30 optimizer steps" in whole and "This run " not in whole


def test_what_each_of_the_two_read_is_told(page):
    """Prevents a distance between two prompts from being read as one between two models."""
    assert "the teacher reads 8 demonstrations, the student 0 or 1 demonstrations, drawn for each text" in page.text
    assert "The teacher read 8 demonstrations before each question. The student read 0 or 1" in page.text
    assert "own beginning" not in page.text
    run = whole_run()
    run["recipe"]["data"]["demonstrations"]["count"], run["data"]["privileged_context"] = 0, {"rows": 104}
    text = Page(build_page(run, whole_report(), {})).text
    assert "The teacher read the row's own context before each question." in text


def test_differences_of_the_same_items(page):
    """Prevents 45 and 46 of 48 right from being read as a difference, in the table of their own task."""
    own, other = page.text.split("Another task, not trained")
    assert "after less fine-tuned on gold answers, points" in own and "after less fine-tuned" not in other
    assert "8 +8.3 (-2.1 to +18.8) 0.300 +2.1 (+0.0 to +6.2) 0.300" in own
    assert "8 -2.1 (-8.3 to +4.2) 0.300" in other and "no difference that 48 items can show" in other
    report = whole_report()
    del report["differences"]
    assert "The same items" not in Page(build_page(whole_run(), report, {})).text


def test_what_has_to_be_read_with_the_fidelity():
    """Prevents intervals that promise too much, notes that nobody sees, and two teachers in one column."""
    run, report = whole_run(), whole_report()
    run["recipe"]["teacher"] = {"kind": "ema"}
    report["fidelity"]["after"] |= {"agreement": 1.0, "agreement_interval": [1.0, 1.0], "notes": ["A <note>."]}
    report["fidelity"]["before"] |= {"texts": 4}
    text = Page(build_page(run, report, {})).text
    assert "student before teacher before student after teacher after" in text
    assert re.search(r"Agreement tokens whose .*? 51\.2% 100\.0% …", text), "neither has an interval"
    assert re.search(r"Mass on 64 tokens .*? 74\.4% 99\.2% 98\.1% 99\.2%", text)
    for words in ("A <note>.", "4 texts are too few for intervals", "The teacher moved", "since all texts gave the"):
        assert words in text, words


def test_the_divergence_is_told_as_it_is_sorted(page):
    """Prevents a table by the sum from being read as one of the tokens that are farthest off."""
    assert "farthest" not in page.text and "by the sum of the KL over all times that each occurs" in page.text
