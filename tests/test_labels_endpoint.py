"""A teacher behind an address: what can go wrong on the way, and that it is tried again, counted and never lost."""

from __future__ import annotations

import email.utils
import json
import time
from pathlib import Path

import pytest
from label_server import Say, endpoint, lines_of, plan_tree, question_of, write_plan
from typer import Typer
from typer.testing import CliRunner

from hfkd.cli.label import label
from hfkd.labels import label_rows, load_plan
from hfkd.labels.asking import Asker, Question
from hfkd.labels.endpoint import EndpointError, Fault, Reply, find_key, is_this_machine, retry_after
from hfkd.labels.ledger import Ledger, alone, question_key
from hfkd.labels.pace import Pace
from hfkd.recipe import RecipeError


def run(tmp_path: Path, replies, prompts=("one",), **sections):
    """Label rows; what the summary says, and the endpoint."""
    with endpoint(replies) as server:
        tree = plan_tree(tmp_path, server.url, list(prompts), **sections)
        return label_rows(load_plan(write_plan(tmp_path, tree))), server


FAULTS = {
    "rate_limit": Say(status=429, headers={"Retry-After": "0"}),
    "server": Say(status=503),
    "empty": Say(""),
    "cut": Say("ye", reason="length"),
    "malformed": Say(body="{not json"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_passing_fault_is_tried_again_and_counted(tmp_path: Path, kind: str) -> None:
    """A row that is lost to one bad reply is a hole in the data that nobody sees."""
    summary, server = run(tmp_path, [FAULTS[kind], FAULTS[kind], Say("walked")], ["walk"])
    assert summary["requests"]["faults"] == {kind: 2} and summary["requests"]["sent"] == 3 == len(server.asked)
    (row,) = lines_of(tmp_path / "out/rows.jsonl")
    assert (row["prompt"], row["completion"]) == ("walk", "walked")


def test_a_slow_reply_is_tried_again(tmp_path: Path) -> None:
    """Without a limit of time one lost connection holds a labelling for ever."""
    summary, _ = run(tmp_path, [Say(delay=0.6), Say("walked")], endpoint={"timeout": 0.25})
    assert summary["requests"]["faults"] == {"timeout": 1}
    assert summary["tokens"]["requests_without_count"] == 1, "what was paid for it isn't known"


def test_an_address_where_nobody_answers_stops_soon(tmp_path: Path) -> None:
    """A server that isn't up must not cost a wait for each of a million rows."""
    tree = plan_tree(tmp_path, "http://127.0.0.1:9/v1", [f"q{n}" for n in range(50)])
    tree["endpoint"] |= {"attempts": 2, "give_up_after": 3, "backoff": 0.0}
    with pytest.raises(EndpointError, match="3 questions in a row were given up; the last: connection"):
        label_rows(load_plan(write_plan(tmp_path, tree)))
    entries = lines_of(tmp_path / "out/ledger.jsonl")
    assert len(entries) == 3 and all(entry["faults"] == {"connection": 2} for entry in entries)


@pytest.mark.parametrize(
    "body",
    ["[]", '"text"', "{}", '{"choices": []}', '{"choices": [{"message": {"content": ["x"]}}]}', '{"choices": null}'],
)
def test_replies_of_any_shape_are_malformed(tmp_path: Path, body: str) -> None:
    """A proxy's own error page, sent as a success, must not end a run with a traceback."""
    summary, _ = run(tmp_path, [Say(body=body), Say("walked")])
    assert summary["requests"]["faults"] == {"malformed": 1}
    assert summary["tokens"]["requests_without_count"] == 1


def test_a_page_in_place_of_json_is_malformed(tmp_path: Path) -> None:
    """The client hands over the text of such a page, which has no choices."""
    page = Say(body="<html>busy</html>", headers={"Content-Type": "text/html"})
    assert run(tmp_path, [page, Say("walked")])[0]["requests"]["faults"] == {"malformed": 1}


def test_what_stays_bad_is_rejected_with_its_reason(tmp_path: Path) -> None:
    """ "Never silently dropped": read rows are labelled or stand in rejected.jsonl."""
    answer = lambda body, number: Say("") if question_of(body) == "bad" else Say("fine")  # noqa: E731
    summary, server = run(tmp_path, answer, ["good", "bad", "also good"])
    assert summary["rows"] == {"read": 3, "labelled": 2, "rejected": {"empty": 1}, "written": 2}
    assert summary["requests"]["faults"] == {"empty": 3} and len(server.asked) == 5
    (lost,) = lines_of(tmp_path / "out/rejected.jsonl")
    assert lost["source_row"] == 1 and lost["prompt"] == "bad" and "no text in the reply" in lost["reasons"][0]
    assert [row["source_row"] for row in lines_of(tmp_path / "out/rows.jsonl")] == [0, 2]


def test_a_refused_question_is_not_repeated(tmp_path: Path) -> None:
    """A prompt that is too long stays too long; asking five times pays five times."""
    answer = lambda body, number: Say(status=400) if question_of(body) == "long" else Say("fine")  # noqa: E731
    summary, server = run(tmp_path, answer, ["long", "short"])
    assert summary["rows"]["rejected"] == {"refused": 1} and len(server.asked) == 2


def test_what_was_refused_before_does_not_end_the_next_run(tmp_path: Path) -> None:
    """Bad rows lie apart in the source, and together in a run that asks for them alone: no filter could be changed."""
    prompts = [f"q{number}" for number in range(24)]
    bad, new = prompts[3::6], ["q24", "q25", "q26"]
    reply = {"now": Say(status=400)}
    answer = lambda body, number: reply["now"] if question_of(body) in [*bad, *new] else Say("fine")  # noqa: E731
    with endpoint(answer) as server:
        tree = plan_tree(tmp_path, server.url, prompts, endpoint={"give_up_after": 3, "attempts": 1})
        assert label_rows(load_plan(write_plan(tmp_path, tree)))["rows"]["rejected"] == {"refused": 4}
        tree["filters"] = [{"kind": "format", "min_chars": 1}]
        assert label_rows(load_plan(write_plan(tmp_path, tree)))["rows"]["rejected"] == {"refused": 4}
        assert len(server.asked) == 24 + 4
        reply["now"] = Say(status=503)
        with pytest.raises(EndpointError, match="3 questions in a row were given up; the last: server"):
            label_rows(load_plan(write_plan(tmp_path, tree)))
        reply["now"] = Say(status=400)
        assert label_rows(load_plan(write_plan(tmp_path, tree)))["rows"]["labelled"] == 20, "an outage changes nothing"
        plan = load_plan(write_plan(tmp_path, plan_tree(tmp_path, server.url, new, endpoint=tree["endpoint"])))
        with pytest.raises(EndpointError, match="3 questions in a row"):
            label_rows(plan)  # new ones count


def test_questions_that_never_had_an_answer_end_every_run(tmp_path: Path) -> None:
    """A plan that the endpoint refuses must not ask everything as soon as it is run for the second time."""
    with endpoint([Say(status=400)]) as server:
        tree = plan_tree(tmp_path, server.url, ["a", "b", "c", "d", "e"], endpoint={"give_up_after": 2})
        for run_number in (1, 2):
            with pytest.raises(EndpointError, match="2 questions in a row"):
                label_rows(load_plan(write_plan(tmp_path, tree)))
            assert len(server.asked) == 2 * run_number


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Say(status=401), "environment variable OPENAI_API_KEY"),
        (Say(status=404), "endpoint.model"),
        (Say(status=429, body='{"error": {"message": "no", "code": "insufficient_quota"}}'), "when there is credit"),
        (Say(status=429, headers={"Retry-After": "7200"}), "asks to wait 7200 seconds"),
    ],
)
def test_what_no_retry_mends_stops_at_once(tmp_path: Path, reply: Say, words: str) -> None:
    """A wrong key is refused a million times otherwise, and some providers block such callers."""
    with endpoint([reply]) as server:
        plan = load_plan(write_plan(tmp_path, plan_tree(tmp_path, server.url, ["one", "two", "three"])))
        with pytest.raises(EndpointError, match=words):
            label_rows(plan)
    assert len(server.asked) == 1


def test_retry_after_is_heeded_by_all_threads(tmp_path: Path) -> None:
    """An endpoint that asks for peace and gets four more requests answers with a longer ban."""
    first = Say(status=429, headers={"Retry-After": "0.5"})
    answer = lambda body, number: first if number == 0 else Say("fine", delay=0.05)  # noqa: E731
    summary, server = run(tmp_path, answer, [f"q{n}" for n in range(4)], endpoint={"parallel": 1})
    assert server.moments[1] - server.moments[0] >= 0.45
    assert summary["rows"]["labelled"] == 4


@pytest.mark.parametrize(("kind", "held"), [("rate_limit", 1), ("server", 0)])
def test_a_limit_without_a_time_holds_all_threads(tmp_path: Path, kind: str, held: int) -> None:
    """A 429 speaks of all requests: threads that go on meanwhile keep the endpoint above its limit."""

    class Told(Pace):
        def hold(self, seconds: float) -> None:
            told.append(seconds)

    class Speaker:
        def ask(self, messages, generation) -> Reply:
            temperatures.append(generation.temperature)
            if len(temperatures) < 3:
                raise Fault(kind, "made up")
            return Reply("yes", 1, 1)

    told, temperatures = [], []
    tree = plan_tree(tmp_path, "http://127.0.0.1:9/v1", ["one"], endpoint={"backoff": 0.04})
    plan = load_plan(write_plan(tmp_path, tree))
    asker = Asker(Speaker(), Ledger(tmp_path / "ledger.jsonl"), plan.endpoint, plan.generation, Told())
    (outcome,) = asker.ask_all([Question([{"role": "user", "content": "q"}], str)], "labels")
    assert outcome.value == "yes" and len(told) == 2 * held
    if held:
        assert 0.02 <= told[0] <= 0.04 <= told[1] <= 0.08, "longer with each attempt"
    assert temperatures == [0.0] * 3, "nothing was wrong with a text, so none is asked for more warmly"


def test_retry_after_is_read_in_every_form() -> None:
    """Servers send seconds, milliseconds or a date; a misread one is a ban or an hour of waiting."""
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < retry_after({"retry-after": date}) <= 31
    assert retry_after({}) is None and retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "-3"}) == 0.0


def test_pace_spreads_requests_and_counts_tokens() -> None:
    """A limit that is kept on average only is one that the endpoint enforces instead, with refusals."""
    now = [100.0]
    pace = Pace(30, 100, clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    pace.wait()
    pace.wait()
    assert now[0] == pytest.approx(102.0), "30 a minute are one in two seconds"
    pace.spend(60)
    now[0] = 110.0
    pace.spend(60)
    pace.wait()
    assert now[0] == pytest.approx(162.0), "until the first 60 tokens are a minute old"
    pace.hold(10)
    pace.wait()
    assert now[0] == pytest.approx(172.0)
    pace.hold(1000)
    pace.wait(stopped=lambda: True)
    assert now[0] == pytest.approx(172.0), "a run that stops must not wait"


def test_cost_counts_every_attempt_and_ends_at_the_budget(tmp_path: Path) -> None:
    """Replies that are thrown away are paid for, too; a forgotten loop must not spend a month's money."""
    price = {"price": {"prompt": 1000.0, "completion": 5000.0}}
    summary, _ = run(tmp_path, [Say("", usage=(10, 0)), Say("yes", usage=(10, 2))], endpoint=price)
    assert summary["cost"] == pytest.approx((20 * 1000 + 2 * 5000) / 1e6)
    folder = tmp_path / "second"
    folder.mkdir()
    with endpoint([Say("yes", usage=(10, 2))]) as server:
        prompts = [f"q{n}" for n in range(9)]
        tree = plan_tree(folder, server.url, prompts, endpoint={**price, "budget": 0.05})
        with pytest.raises(EndpointError, match="budget is spent: 0.0600 of 0.05"):
            label_rows(load_plan(write_plan(folder, tree)))
        assert len(server.asked) == 3
        tree["endpoint"]["budget"] = 1.0
        summary = label_rows(load_plan(write_plan(folder, tree)))
        assert len(server.asked) == 9 and summary["requests"]["answers_reused"] == 3
        assert summary["cost"] == pytest.approx(9 * 0.02), "what the first run spent counts"


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Answers are paid for: a run that is killed in the middle of a line must ask only for what is missing."""
    prompts = [f"q{n}" for n in range(6)]
    with endpoint(lambda body, number: Say("to " + question_of(body))) as server:
        plan = load_plan(write_plan(tmp_path, plan_tree(tmp_path, server.url, prompts)))
        label_rows(plan)
        before = (tmp_path / "out/rows.jsonl").read_bytes()
        ledger = tmp_path / "out/ledger.jsonl"
        ledger.write_bytes(ledger.read_bytes()[:-40])
        summary = label_rows(plan)
        assert len(server.asked) == 7 and summary["requests"]["sent_by_this_run"] == 1
        assert (tmp_path / "out/rows.jsonl").read_bytes() == before
        assert len(lines_of(ledger)) == 6
        label_rows(plan)
        assert len(server.asked) == 7, "nothing is asked twice"
        other = load_plan(write_plan(tmp_path, plan_tree(tmp_path, server.url, prompts)), ["generation.temperature=1"])
        label_rows(other)
        assert len(server.asked) == 13, "another way to write is another question"


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    """A line that was edited by hand must not become a label, nor vanish."""
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"key": "a", "text": "x"}\n{"key": 3}\n')
    with pytest.raises(ValueError, match="Line 2 of .* is damaged"):
        Ledger(path)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """Two ledgers in one file are lines torn into each other."""
    with alone(tmp_path / "out"), pytest.raises(ValueError, match="Another `hfkd label`"), alone(tmp_path / "out"):
        pass


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    """A source that repeats itself is paid for once."""
    summary, server = run(tmp_path, [Say("yes")], ["one", "one", "two"])
    assert len(server.asked) == 2 and summary["rows"]["labelled"] == 3
    assert any("prompt that another has too" in words for words in summary["warnings"])


def test_the_key_of_a_question_is_all_that_decides_its_answer() -> None:
    """A key that leaves out the system prompt hands out the answers of another one."""
    asked = [{"role": "user", "content": "a"}]
    keys = {
        question_key("m", asked, {"temperature": 0}, 0),
        question_key("n", asked, {"temperature": 0}, 0),
        question_key("m", [{"role": "system", "content": "b"}, *asked], {"temperature": 0}, 0),
        question_key("m", asked, {"temperature": 1}, 0),
        question_key("m", asked, {"temperature": 0}, 1),
    }
    assert len(keys) == 5


def test_what_is_sent(tmp_path: Path) -> None:
    """A temperature or a limit that gets lost on the way makes other data than the summary says."""
    generation = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"], "seed": 3, "extra": {"top_k": 4}}
    replies = [Say(""), Say("yes"), Say("no")]
    _, server = run(tmp_path, replies, generation=generation, samples=2, template={"system": "Be short."})
    first = server.asked[0]
    assert {name: first[name] for name in ("max_tokens", "temperature", "top_p", "stop", "seed", "top_k")} == {
        **{"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"], "seed": 3, "top_k": 4}
    }
    assert first["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "one"}]
    assert server.asked[1]["temperature"] == 0.7, "asked again, a little warmer"
    assert len({body["seed"] for body in server.asked}) == 3, "samples with one seed are one sample"


def test_the_key_goes_to_the_endpoint_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in a file or a message is a key that gets published."""
    secret = "not-of-a-known-form-123456"
    monkeypatch.setenv("MY_KEY", secret)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    body = json.dumps({"error": {"message": f"bad key {secret}"}})
    answer = lambda body_, number: Say(status=400, body=body) if question_of(body_) == "bad" else Say("ok")  # noqa: E731
    _, server = run(tmp_path, answer, ["bad", "good"], endpoint={"api_key_env": "MY_KEY"})
    assert all(headers["authorization"] == f"Bearer {secret}" for headers in server.headers)
    assert not any("org-private" in str(headers) for headers in server.headers)
    written = [path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert len(written) >= 5 and not any(secret in text for text in written)
    assert "bad key ***" in (tmp_path / "out/rejected.jsonl").read_text()


def test_a_key_is_needed_for_other_machines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever serves a model at home has no key; whoever forgot it should hear so before the rows are read."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert is_this_machine("http://localhost:8000/v1") and is_this_machine("http://[::1]:1/v1")
    assert not is_this_machine("https://localhost.example.com/v1")
    plan = load_plan(write_plan(tmp_path, plan_tree(tmp_path, "https://teacher.example.com/v1", ["one"])))
    with pytest.raises(EndpointError, match="OPENAI_API_KEY is not set"):
        find_key(plan.endpoint)
    assert find_key(plan.endpoint.model_copy(update={"api_key_env": None})) is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("endpoint.api_key=abcdef-123", "endpoint.api_key: unknown key; did you mean api_key_env"),
        ("endpoint.api_key_env=abcdef-123", "expected the name of an environment variable"),
        ("endpoint.url=127.0.0.1:8000", "expected an address such as http"),
        ("endpoint.url=https://me:abcdef-123@x.org/v1", "without a name, a password"),
        ("endpoint.budget=3", "budget needs price"),
        ("endpoint.parallel=0", "greater than or equal to 1"),
        ("samples=3", "samples: got 3 with generation.temperature 0"),
        ("filters=[{kind: agreement}]", "samples is 1"),
        ("generation.extra={n: 2}", "extra holds n"),
        ("template.kind=null", "template.kind"),
        ("data.pth=x", "data.pth: unknown key; did you mean path"),
    ],
)
def test_a_plan_is_refused_before_anything_is_asked(tmp_path: Path, override: str, words: str) -> None:
    """A fault that shows after a thousand paid requests is a thousand requests too late; and no key is shown."""
    path = write_plan(tmp_path, plan_tree(tmp_path, "http://127.0.0.1:9/v1", ["one"]))
    with pytest.raises(RecipeError) as caught:
        load_plan(path, [override])
    assert words in str(caught.value) and "abcdef-123" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": {"kind": "labels"}}, "template.kind: got 'labels'; expected label, rationale, extraction"),
        ({"template": {"lables": ["a", "b"]}}, "template.lables: unknown key; did you mean labels"),
        ({"template": {"instruction": "Tell me."}}, "instruction has no {prompt}"),
        ({"template": {"instruction": "{prompt} {answer}"}}, "a place {answer} that nothing fills"),
        ({"template": {"pattern": "("}}, "no regular expression"),
        ({"template": {"examples": [{"prompt": "a"}]}}, "expected {prompt: ..., completion: ...}"),
        ({"filters": [{"kind": "verifier", "verifier": "exakt"}]}, "filters.0: verifier is 'exakt'"),
        ({"filters": [{"kind": "verifier", "verifier": "exact", "least": 0}]}, "least is 0"),
        ({"filters": [{"kind": "format"}]}, "without them nothing is dropped"),
        ({"filters": [{"kind": "self_evaluation", "grades": 5}]}, "grades is 5 and least None"),
        (
            {"filters": [{"kind": "self_evaluation", "generation": {"max_token": 3}}]},
            "filters.0: generation.max_token: unknown key; did you mean max_tokens",
        ),
        ({"template": {"kind": "extraction"}, "keep": "all"}, "keep: got all with the template extraction"),
        (
            {"template": {"kind": "hfkd.labels.extraction:ExtractionTemplate"}, "keep": "all"},
            "would contradict each other",
        ),
        ({"template": {"kind": "no_such_module:Mine"}}, "can't be imported"),
    ],
)
def test_parts_are_refused_before_anything_is_asked(tmp_path: Path, changes: dict, words: str) -> None:
    """As above, for what a class says of its arguments."""
    with endpoint([Say("yes")]) as server:
        plan = load_plan(write_plan(tmp_path, plan_tree(tmp_path, server.url, ["one"], **changes)))
        with pytest.raises(ValueError) as caught:
            label_rows(plan)
    assert words in str(caught.value) and not server.asked


def test_the_command_says_what_came_of_it(tmp_path: Path) -> None:
    """Whoever ran it should know where the rows are, and how many aren't there."""
    app = Typer()
    app.command()(label)
    answer = lambda body, number: Say("") if question_of(body) == "bad" else Say("fine")  # noqa: E731
    with endpoint(answer) as server:
        path = write_plan(tmp_path, plan_tree(tmp_path, server.url, ["good", "bad"]))
        done = CliRunner().invoke(app, [str(path), "endpoint.attempts=2"])
        assert done.exit_code == 0, done.output
        assert "1 of 2 rows are labelled; left out: 1 empty" in done.stdout
        assert f"data.train.path={tmp_path}/out/rows.jsonl" in done.stdout
        wrong = CliRunner().invoke(app, [str(path), "endpoint.atempts=2"])
    assert wrong.exit_code == 2 and "did you mean attempts" in wrong.stderr
