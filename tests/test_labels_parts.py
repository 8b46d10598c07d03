"""Templates, filters and scores: how a teacher's text becomes an answer, and which answers stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from label_server import Say, endpoint, lines_of, plan_tree, question_of, write_plan

import hfkd
from hfkd.errors import VerifierError
from hfkd.labels import Answer, FormatError, SpanScores, label_rows, load_plan, span_f1, span_scores
from hfkd.labels.asking import Outcome
from hfkd.labels.extraction import ExtractionTemplate
from hfkd.labels.filters import AgreementFilter, FormatFilter, Labelled, SelfEvaluationFilter, VerifierFilter
from hfkd.labels.parts import make_filters, make_template
from hfkd.labels.plan import own_code
from hfkd.labels.spans import read_spans, score_predictions
from hfkd.labels.templates import LabelTemplate, RationaleTemplate, fill
from hfkd.recipe import load_recipe

ROW = {"prompt": "Is 7 prime?", "answer": "yes"}
PASSAGE = {"prompt": "Ada Lovelace met Babbage in London."}


def answer(text: str, completion: str | None = None) -> Answer:
    return Answer(text, text, completion or text, text.casefold())


def nobody(questions):
    raise AssertionError("this filter asks nobody")


def judged(one, answers, asked=None, row=ROW, ask=nobody):
    return one.judge([Labelled(0, row, asked or len(answers), answers)], ask)[0]


def test_braces_of_a_row_stay_as_they_are() -> None:
    """`str.format` stops at the first row with code in it, or fills what the row's author wrote."""
    assert fill("{prompt}!", prompt="a {prompt} {x} {0}", other="b") == "a {prompt} {x} {0}!"
    assert LabelTemplate("Say {prompt}").messages({"prompt": "{answer}"})[0]["content"] == "Say {answer}"


def test_what_the_teacher_reads() -> None:
    """Examples in one message, or behind the question, are examples of something else."""
    template = LabelTemplate("Q: {prompt}", "Be short.", [{"prompt": "a", "completion": "b"}])
    roles = [(one["role"], one["content"]) for one in template.messages({"prompt": "c"})]
    assert roles == [("system", "Be short."), ("user", "Q: a"), ("assistant", "b"), ("user", "Q: c")]
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    asked = LabelTemplate("Q: {prompt}").messages({"prompt": turns})
    assert [one["content"] for one in asked] == ["x", "y", "Q: z"]


def test_labels_in_one_spelling() -> None:
    """A student that learns "Positive." and "positive" as two classes learns neither."""
    template = LabelTemplate(labels=["positive", "negative"])
    assert template.read(ROW, " Positive.\n").completion == "positive"
    with pytest.raises(FormatError, match="is none of positive, negative"):
        template.read(ROW, "It is positive, I think")
    found = LabelTemplate(labels=["yes", "no"], pattern=r"answer is (\w+)")
    assert found.read(ROW, "The answer is no... the answer is Yes!").answer == "yes"
    with pytest.raises(FormatError, match="nothing in it matches"):
        found.read(ROW, "yes")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("7 has no divisors.", "no line begins with"),
        ("Answer: yes", "no reasons before"),
        ("Because.\nAnswer:", "expected one line"),
        ("Because.\nAnswer: yes\nOr not.", "expected one line"),
        ("Because the Answer: yes", "no line begins with"),
    ],
)
def test_a_rationale_that_is_none(text: str, reason: str) -> None:
    """A student of cut reasons learns to stop in the middle."""
    with pytest.raises(FormatError, match=reason):
        RationaleTemplate().read(ROW, text)


def test_a_rationale_in_two_parts() -> None:
    """The short answer is what is checked and voted on; the reasons are what is learned."""
    read = RationaleTemplate(completion="{answer}: {rationale}").read(
        ROW, "Answer: no?\nIt has {two} divisors.\n**Answer:** Yes"
    )
    assert (read.answer, read.completion) == ("Yes", "Yes: Answer: no?\nIt has {two} divisors.")
    other = RationaleTemplate().read(ROW, "Other reasons.\nanswer: yes.")
    assert read.value == other.value and other.completion == "Other reasons.\nAnswer: yes."


def test_rows_keep_the_form_and_the_gold_answer_of_the_source() -> None:
    """A gold answer that is overwritten by the teacher's makes the teacher right by definition."""
    template = LabelTemplate()
    (row,) = template.rows([(3, {**ROW, "domain": "numbers", "completion": "old"}, answer("no"))])
    assert row == {
        **{"prompt": "Is 7 prime?", "completion": "no", "answer": "yes", "domain": "numbers"},
        **{"teacher_answer": "no", "source_row": 3},
    }
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "old"}]}
    (row,) = template.rows([(0, chat, answer("new"))])
    assert row["prompt"] == [{"role": "user", "content": "a"}]
    assert row["completion"] == [{"role": "assistant", "content": "new"}] and row["answer"] == "new"


def test_extraction_gives_a_question_for_each_type() -> None:
    """A student that is never asked for what isn't there always finds something."""
    template = ExtractionTemplate(negatives=2)
    first = template.read(PASSAGE, 'Here: [["Ada Lovelace", "Person"], ["Babbage", "person "], ["London", "place"]]')
    second = template.read({"prompt": "It rained on 3 May."}, '[["3 May", "date"], ["3 May", "date"]]')
    rows = template.rows([(0, PASSAGE, first), (1, {"prompt": "It rained on 3 May."}, second)])
    got = [(row["source_row"], row["type"], row["completion"]) for row in rows]
    assert got[:3] == [(0, "person", '["Ada Lovelace", "Babbage"]'), (0, "place", '["London"]'), (0, "date", "[]")]
    assert got[3] == (1, "date", '["3 May"]') and {kind for _, kind, _ in got[4:]} == {"person", "place"}
    assert all(row["answer"] == row["completion"] and row["type"] in row["prompt"] for row in rows)
    assert template.rows([(0, PASSAGE, first), (1, PASSAGE, second)])[:2] == rows[:2], "the draw is seeded"


def test_absent_types_are_drawn_by_frequency() -> None:
    """Types that nobody has are told apart too easily."""
    common = [
        (n, {"prompt": f"Ada {n}"}, ExtractionTemplate().read({"prompt": f"Ada {n}"}, '[["Ada", "person"]]'))
        for n in range(200)
    ]
    rare = ExtractionTemplate().read({"prompt": "Oslo"}, '[["Oslo", "place"]]')
    plain = [
        (n, {"prompt": "Oslo at 5"}, ExtractionTemplate().read({"prompt": "Oslo at 5"}, '[["5", "hour"]]'))
        for n in range(200, 300)
    ]
    rows = ExtractionTemplate(negatives=1).rows([*common, (300, {"prompt": "Oslo"}, rare), *plain])
    drawn = [row["type"] for row in rows if row["source_row"] >= 200 and row["completion"] == "[]"]
    assert drawn.count("person") > 90 and len(drawn) == 101


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("There is nobody.", "no JSON list"),
        ('[["Ada Lovelace", "person"]', "no valid JSON list"),
        ('["Ada Lovelace"]', "expected pairs"),
        ('[["Ada Lovelace", 3]]', "expected pairs"),
        ('[["Lady Lovelace", "person"]]', "doesn't stand in the passage"),
        ('[["London", "city"]]', "none of the types"),
    ],
)
def test_an_extraction_that_is_none(text: str, reason: str) -> None:
    """An entity that isn't in the passage teaches a student to invent."""
    with pytest.raises(FormatError, match=reason):
        ExtractionTemplate(types=["Person", "place"]).read(PASSAGE, text)


def test_given_types_are_all_asked_about() -> None:
    """With a list of types the negatives are those that a passage lacks, and the teacher is told the list."""
    template = ExtractionTemplate(types=["Person", "animal"], conversation=True)
    assert "person, animal" in template.messages(PASSAGE)[-1]["content"]
    rows = template.rows([(0, PASSAGE, template.read(PASSAGE, "[]"))])
    assert [(row["type"], row["answer"]) for row in rows] == [("person", "[]"), ("animal", "[]")]
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["user", "assistant", "user"]
    assert rows[0]["prompt"][0]["content"] == PASSAGE["prompt"]


def test_strict_f1_by_hand() -> None:
    """Half a name, another type or another case is not found; the numbers here are counted by hand."""
    gold = [{("person", "Ada Lovelace"), ("place", "London")}, {("date", "3 May")}, set()]
    said = [{("person", "Ada"), ("place", "London"), ("person", "London")}, None, set()]
    scores = span_scores(said, gold)
    assert scores == SpanScores(correct=1, predicted=3, gold=3, unreadable=1)
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert span_scores([["a", "a", "b"]], [["a"]]) == SpanScores(1, 2, 1), "each span counts once"
    nothing = span_scores([set()], [set()])
    assert (nothing.precision, nothing.recall, nothing.f1) == (1.0, 1.0, 1.0)
    assert span_scores([{"a"}], [set()]).f1 == 0.0 == span_scores([set()], [{"a"}]).precision
    with pytest.raises(ValueError):
        span_scores([set()], [])


def test_span_f1_as_a_verifier() -> None:
    """A list that can't be read is not the empty list, which may be right."""
    row = {"prompt": "p", "answer": '["a", "b"]'}
    assert span_f1(row, 'So: ["b", "c"]') == pytest.approx(0.5)
    assert span_f1({"answer": "[]"}, "[]") == 1.0 and span_f1({"answer": "[]"}, "none") == 0.0
    with pytest.raises(ValueError):
        span_f1({"prompt": "p"}, "[]")
    assert read_spans('x [" a ", "b", "a"] [3]') == ["a", "b"]
    lines = [{"gold": '["a"]', "text": ' ["a"]\n'}, {"gold": '["b"]', "text": "b"}]
    assert score_predictions(lines) == SpanScores(1, 1, 2, 1)


def test_format_filter() -> None:
    """What is in the right form may still be an apology."""
    one = FormatFilter(pattern=r"[a-z ]+", forbidden=["As an AI"], min_chars=2, max_chars=20)
    faults = judged(one, [answer("a"), answer("as an ai i"), answer("B2"), answer("x" * 21), answer("walked")])
    assert [bool(fault) for fault in faults] == [True, True, True, True, False]
    assert "'as an ai'" in faults[1]


def test_verifier_filter() -> None:
    """The checker reads the short answer; with reasons in front of it nothing is ever exact."""
    faults = judged(VerifierFilter("exact"), [answer("Yes", "Because.\nAnswer: Yes"), answer("no")])
    assert faults[0] == "" and "exact gives 'no' the mark 0" in faults[1]
    half = VerifierFilter("exact", least=0.5)
    half._verifier = lambda row, text: 0.5
    assert judged(half, [answer("yes")]) == [""]


@pytest.mark.parametrize("broken", ["nan", "raises"])
def test_a_broken_verifier_stops_and_names_the_row(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken as 0, a checker that fails throws away all that was paid for."""
    import hfkd.data.verify as verify

    def check(row, text):
        if broken == "raises":
            raise KeyError("golden")
        return float("nan")

    monkeypatch.setitem(verify.VERIFIERS, "broken", check)
    with pytest.raises(VerifierError, match="is 7 prime|gave nan"):
        judged(VerifierFilter("broken"), [answer("yes")])


def test_agreement() -> None:
    """Samples that failed agree with nobody: two of two answers are no majority of five samples."""
    votes = [answer("a", "one"), answer("A", "two"), answer("b")]
    assert judged(AgreementFilter(0.5), votes) == ["", "", "outvoted, 2 of 3"]
    assert judged(AgreementFilter(0.5), votes[:2], asked=5) == ["the most frequent answer has 2 of 5 votes"] * 2
    assert judged(AgreementFilter(0.25), [answer("a"), answer("b")], asked=4)[0].startswith("two answers have 1 of 4")


def test_self_evaluation() -> None:
    """The teacher must read the whole answer, and a verdict that can't be had is no yes."""
    asked = []

    def ask(questions):
        asked.extend(questions)
        texts = ["Yes.", "No, it isn't.", "Hm."]
        outcomes = []
        for question, text in zip(questions, texts, strict=True):
            try:
                outcomes.append(Outcome(question.read(text)))
            except FormatError as error:
                outcomes.append(Outcome(None, "format", str(error)))
        return outcomes

    faults = judged(SelfEvaluationFilter(), [answer("yes", "B.\nAnswer: yes"), answer("no"), answer("?")], ask=ask)
    assert faults[0] == "" and faults[1] == "the teacher calls it wrong" and faults[2].startswith("no verdict")
    assert "B.\nAnswer: yes" in asked[0].messages[0]["content"] and "Is 7 prime?" in asked[0].messages[0]["content"]
    graded = SelfEvaluationFilter(grades=5, least=4)
    assert judged(graded, [answer("a")], ask=lambda questions: [Outcome(3)]) == ["the teacher's grade is 3"]


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        *[("4", 4), ("I give it 5/5.", 5), ("Grade: 1", 1), ("**4**/5", 4), ("4.0", 4), ("Grade-3.", 3)],
        *[("I'd give it 2 out of 5.", 2), ("Grade: 4 Out Of 5", 4), ("3 of 5", 3), ("2 / 5", 2)],
        *[("On a scale of 1 to 5, I'd say 2.", 2), ("2 (1-5)", 2)],
        *[("9", None), ("good", None), ("2.5", None), ("-4", None), ("two out of 5", None), ("0/5", None)],
        *[("I give it 5 because of 2 reasons", None), ("4/10", None), ("4 or 5", None), ("2/50", None)],
    ],
)
def test_a_grade_is_the_only_number(text: str, grade: int | None) -> None:
    """The best grade, which teachers name beside theirs, must not be taken for it: bad answers would pass."""
    graded = SelfEvaluationFilter(grades=5, least=4)
    if grade is not None:
        assert graded._verdict(text) == grade
    else:
        with pytest.raises(FormatError, match="no grade from 1 to 5"):
            graded._verdict(text)


def test_a_verdict_is_not_written_as_a_label_is(tmp_path) -> None:
    """Three tokens are enough for a label and cut every verdict; a verdict that is drawn at 1.3 is none."""
    own = {"max_tokens": 3, "temperature": 1.3, "top_p": 0.9, "stop": ["\n"], "seed": 4, "extra": {"top_k": 4}}
    sent = {}
    for number, settings in enumerate([{}, {"generation": {"max_tokens": 5, "extra": {"top_k": 9}}}]):
        with endpoint([Say("x"), Say("Hm."), Say("yes")]) as server:
            filters = [{"kind": "self_evaluation", **settings}]
            folder = tmp_path / str(number)
            folder.mkdir()
            tree = plan_tree(folder, server.url, ["a"], generation=own, filters=filters)
            assert label_rows(load_plan(write_plan(folder, tree)))["rows"]["labelled"] == 1
        asked = [{key: body[key] for key in body if key not in ("messages", "model")} for body in server.asked]
        label, sent[number], again = asked
        assert label == {key: value for key, value in own.items() if key != "extra"} | {"top_k": 4}
        assert again == {**sent[number], "temperature": 0.7}, "a bad text is asked for again more warmly"
    assert sent[0] == {"max_tokens": 64, "temperature": 0.0}
    assert sent[1] == {"max_tokens": 5, "temperature": 0.0, "top_k": 9}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('In [London]: ["Ada"]', ["Ada"]),
        ('[a] [b ["c"]] ["Ada"] ["x"]', ["Ada"]),
        ('] ["Ada"]', ["Ada"]),
        ('[["Ada"], ["x"]', None),
        ('[London: ["Ada"]', None),
        ("[London]", None),
    ],
)
def test_the_list_is_found_behind_other_brackets(text: str, found: list[str] | None) -> None:
    """An aside in brackets must not hide the list; and half a list is none, though a whole one may lie in it."""
    if found is not None:
        assert read_spans(text) == found and span_f1({"answer": '["Ada"]'}, text) == 1.0
    else:
        with pytest.raises(ValueError, match="no valid JSON list"):
            read_spans(text)


def test_pairs_survive_any_text() -> None:
    """Quotes and letters of other scripts must come back from JSON as they went in."""
    row = {"prompt": 'Zoë said "hi" to 東京.'}
    read = ExtractionTemplate().read(row, json.dumps([['"hi"', "word"], ["東京", "place"]]))
    rows = ExtractionTemplate(negatives=0).rows([(0, row, read)])
    assert [json.loads(one["completion"]) for one in rows] == [['"hi"'], ["東京"]]


@pytest.mark.parametrize("sampled", [True, False])
def test_samples_that_are_no_samples_are_told(sampled: bool, tmp_path) -> None:
    """Three copies of one text agree always; and what agreed after a filter may well have differed before it."""
    answer = lambda body, number: Say("a" if not sampled or number % 3 else "b")  # noqa: E731
    with endpoint(answer) as server:
        tree = plan_tree(tmp_path, server.url, [f"q{n}" for n in range(5)], generation={"temperature": 1.0})
        tree |= {"samples": 3, "filters": [{"kind": "agreement", "least": 0.6}]}
        summary = label_rows(load_plan(write_plan(tmp_path, tree)))
    assert summary["rows"]["labelled"] == 5 and summary["answers"]["passed"] == (10 if sampled else 15)
    assert any("doesn't seem to sample" in words for words in summary["warnings"]) is not sampled


def test_filters_in_a_run_drop_rows_with_reasons(tmp_path) -> None:
    """The counts of a summary must add up to the rows that were read, whatever dropped them."""

    def answer(body, number):
        asked = question_of(body)
        if "Is the answer right?" in asked:
            return Say("no" if "q1" in asked else "yes")
        return Say("sorry" if asked == "q2" else f"to {asked}")

    filters = [{"kind": "format", "forbidden": ["sorry"]}, {"kind": "self_evaluation"}]
    with endpoint(answer) as server:
        tree = plan_tree(tmp_path, server.url, ["q0", "q1", "q2", "q3"], filters=filters)
        summary = label_rows(load_plan(write_plan(tmp_path, tree)))
    assert summary["rows"] == {"read": 4, "labelled": 2, "rejected": {"self_evaluation": 1, "format": 1}, "written": 2}
    assert len(server.asked) == 4 + 3, "what is dropped before isn't judged"
    card = (tmp_path / "out/README.md").read_text()
    assert "license: unknown" in card and "1 (self_evaluation), 1 (format)" in card and str(tmp_path) not in card


def test_all_different_answers_can_be_kept(tmp_path) -> None:
    """Several right answers to one question are several lessons; the same one twice is not."""
    with endpoint([Say("a"), Say("b"), Say("a")]) as server:
        tree = plan_tree(tmp_path, server.url, ["q"], generation={"temperature": 1.0})
        label_rows(load_plan(write_plan(tmp_path, tree | {"samples": 3, "keep": "all"})))
    assert [row["completion"] for row in lines_of(tmp_path / "out/rows.jsonl")] == ["a", "b"]


def test_a_template_of_ones_own_is_told_and_used(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that a plan brings must be named before it is imported, as a recipe's is."""
    (tmp_path / "my_templates.py").write_text(
        "from hfkd.labels import Answer, Template\n\n\nclass Loud(Template):\n    def read(self, row, text):\n"
        "        return Answer(text, text, text.upper(), text)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with endpoint([Say("a")]) as server:
        plan = load_plan(
            write_plan(tmp_path, plan_tree(tmp_path, server.url, ["q"], template={"kind": "my_templates:Loud"}))
        )
        assert own_code(plan) == {"template.kind": "my_templates:Loud"}
        label_rows(plan)
    assert lines_of(tmp_path / "out/rows.jsonl")[0]["completion"] == "A"


def test_the_recipes_fit_together() -> None:
    """The student's recipe must read the file that the plan writes."""
    folder = Path(__file__).parent.parent / "recipes" / "black_box"
    plan = load_plan(folder / "label.yaml")
    make_template(plan), make_filters(plan)
    assert Path(plan.data.path).is_file()
    student = load_recipe(folder / "student.yaml")
    assert Path(student.data.train.path) == Path(plan.output_dir) / "rows.jsonl"


def test_only_the_command_knows_of_labels() -> None:
    """Every option off: what trains and what is trained must not change, nor need a package, because this is here."""
    package = Path(hfkd.__file__).parent
    knowing = {path.relative_to(package) for path in package.rglob("*.py") if "hfkd.labels" in path.read_text("utf-8")}
    assert {path.as_posix() for path in knowing if path.parts[0] != "labels"} == {"cli/label.py"}
