"""Rows from files, folders, hub ids and reasoning-gym, and what is said when they can't be used."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import datasets
import pytest

from hfkd.data.load import Source, load_rows

PAIRS = [{"prompt": "go", "completion": "went"}, {"prompt": "sing", "completion": "sang"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the Arrow copies of the test files out of the user's cache, and its progress bars out of the output."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def write(folder: Path, kind: str) -> str:
    path = folder / f"pairs.{kind}"
    if kind == "jsonl":
        return jsonl(path, PAIRS)
    if kind == "json":
        path.write_text(json.dumps(PAIRS), encoding="utf-8")
    elif kind == "csv":
        path.write_text("prompt,completion\ngo,went\nsing,sang\n", encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(PAIRS).to_parquet(path)
    else:
        path.write_text("- {prompt: go, completion: went}\n- {prompt: sing, completion: sang}\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "yaml", "yml"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    """A kind of file that gives other rows would train on other data for a change of suffix."""
    rows = list(load_rows(Source(path=write(tmp_path, kind))))
    assert rows == [{**pair, "answer": pair["completion"]} for pair in PAIRS]


def test_any_split_name_stands_for_a_single_file_and_slices_work(tmp_path: Path) -> None:
    """The default split of an evaluation is `test`; a user's own file would be refused for a name it can't have."""
    path = write(tmp_path, "jsonl")
    assert len(load_rows(Source(path=path, split="test"))) == 2
    assert load_rows(Source(path=path, split="test[1:]"))["prompt"] == ["sing"]


def test_folder_with_splits(tmp_path: Path) -> None:
    """An unknown split of a folder must name those there are, not load another one."""
    jsonl(tmp_path / "train.jsonl", PAIRS)
    jsonl(tmp_path / "test.jsonl", PAIRS[:1])
    assert len(load_rows(Source(path=str(tmp_path), split="test"))) == 1
    with pytest.raises(ValueError, match="Unknown split.*train.*test"):
        load_rows(Source(path=str(tmp_path), split="validation"))


def test_hub_id_goes_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision that gets lost on the way loads other data than the recipe names."""
    seen: dict = {}

    def fake(path: str, **arguments: object) -> datasets.Dataset:
        seen.update(path=path, **arguments)
        return datasets.Dataset.from_list([{"question": "go", "answer": "went"}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    columns = {"prompt": "question", "completion": "answer"}
    rows = load_rows(Source(path="org/set", name="main", split="test", revision="abc", columns=columns))
    assert seen == {"path": "org/set", "name": "main", "split": "test", "revision": "abc"}
    assert list(rows) == [{"prompt": "go", "completion": "went", "answer": "went"}]


def test_unreachable_hub_says_that_no_file_is_there_either() -> None:
    """A misspelt file name without suffix looks like a hub id; the network alone would be the wrong place to look."""
    with pytest.raises(ValueError, match="no local file or folder nothing/here"):
        load_rows(Source(path="nothing/here"))


def test_columns_are_mapped_numbers_become_text_and_words_stay(tmp_path: Path) -> None:
    """pandas reads NA and null as nothing and 1 as a number: rows would vanish or crash in a template."""
    path = tmp_path / "a.csv"
    path.write_text("word,ordinal\n1,first\nNA,null\n", encoding="utf-8")
    rows = load_rows(Source(path=str(path), columns={"prompt": "word", "completion": "ordinal"}))
    assert rows["prompt"] == ["1", "NA"] and rows["completion"] == ["first", "null"]
    path.write_text("word,number\nfirst,1\n", encoding="utf-8")
    assert load_rows(Source(path=str(path), columns={"prompt": "word", "completion": "number"}))["completion"] == ["1"]


def test_gold_answer_and_optional_columns_are_kept_and_others_dropped(tmp_path: Path) -> None:
    """Scoring against the reasoning instead of the short answer makes every prediction wrong."""
    full = {"prompt": "2+2", "completion": "It is 4.", "answer": "4", "privileged_context": "hint", "id": 7}
    shown = {"demonstrations": [{"prompt": "1+1", "completion": "2"}]}
    rows = load_rows(Source(path=jsonl(tmp_path / "a.jsonl", [full | shown, {"prompt": "a", "completion": " b "}])))
    assert rows.column_names == ["prompt", "completion", "privileged_context", "demonstrations", "answer"]
    assert rows["answer"] == ["4", "b"] and rows["privileged_context"] == ["hint", None]
    assert rows[0]["demonstrations"] == [{"prompt": "1+1", "completion": "2"}]


def test_conversations_are_rows_too(tmp_path: Path) -> None:
    """TRL's conversational formats must load as they are."""
    user, assistant = {"role": "user", "content": "go"}, {"role": "assistant", "content": " went "}
    rows = load_rows(Source(path=jsonl(tmp_path / "m.jsonl", [{"messages": [user, assistant]}])))
    assert rows[0] == {"messages": [user, assistant], "answer": "went"}
    rows = load_rows(Source(path=jsonl(tmp_path / "p.jsonl", [{"prompt": [user], "completion": [assistant]}])))
    assert rows[0]["prompt"] == [user] and rows[0]["answer"] == "went"


def test_size_takes_a_seeded_choice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first rows of a sorted file aren't a sample, and another choice at each start can't be resumed."""
    path = jsonl(tmp_path / "n.jsonl", [{"prompt": str(n), "completion": "x"} for n in range(40)])
    first, again, other = (load_rows(Source(path=path, size=5, seed=seed))["prompt"][:] for seed in (0, 0, 1))
    assert len(first) == 5 and first == again != other
    assert len(load_rows(Source(path=path, size=50))) == 40
    assert "fewer than the 50" in caplog.text
    with pytest.raises(ValueError, match="size is 0"):
        load_rows(Source(path=path, size=0))


def test_rows_without_answers_only_where_a_teacher_writes_them(tmp_path: Path) -> None:
    """Prompts alone must do for a teacher that answers, and must not pass where the data set is to answer."""
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "go"}])
    assert list(load_rows(Source(path=path), require_completion=False)) == [{"prompt": "go"}]
    with pytest.raises(
        ValueError, match=r"columns prompt\) has no column 'completion'.*columns: \{completion: <column>"
    ):
        load_rows(Source(path=path))


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([{"q": "a", "a": "b"}], {}, r"columns q, a\) has no column 'prompt'.*columns: \{prompt: <column>\}"),
        (
            PAIRS,
            {"columns": {"prompt": "prompts"}},
            "maps 'prompt' to 'prompts', which isn't there; did you mean prompt",
        ),
        (PAIRS, {"columns": {"promt": "prompt"}}, "maps 'promt'; known columns .*did you mean prompt"),
        ([*PAIRS, {"prompt": " ", "completion": "x"}], {}, "row 2: the column 'prompt' is empty"),
        ([{"prompt": "a", "completion": None}, PAIRS[0]], {}, "row 0: the column 'completion' is empty"),
        ([{"prompt": {"a": 1}, "completion": "x"}], {}, "row 0: the column 'prompt' holds .*expected a text"),
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": "x"}], {}, "one form"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "at least a question and an answer"),
        ([{"messages": [{"role": "user", "content": "a"}] * 2}], {}, "of the role 'user'; expected 'assistant'"),
        ([{"messages": [{"content": "a"}] * 2}], {}, "expected messages such as"),
        (PAIRS, {"format": "gsm8"}, "no format 'gsm8'; did you mean gsm8k"),
        (PAIRS, {"format": "nowhere.at_all:function"}, "can't be imported"),
        (PAIRS, {"format": "gsm8k"}, "row 0: .*question"),
        (PAIRS, {"format": "test_data_load:no_dictionary"}, "returned 'go'; expected a dictionary"),
        (PAIRS, {"options": {"trust_remote_code": True}}, "code of a data set is never run"),
        ([PAIRS[0] | {"demonstrations": [{"prompt": "x"}]}], {}, "row 0: the column 'completion' is empty"),
    ],
)
def test_what_is_wrong_with_rows_is_said(tmp_path: Path, rows: list, settings: dict, words: str, monkeypatch) -> None:
    """Each of these would otherwise train on nothing, or fail far away from its cause."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(ValueError, match=words):
        load_rows(Source(path=jsonl(tmp_path / "rows.jsonl", rows), **settings))


def no_dictionary(row: dict) -> str:
    return row["prompt"]


def swapped(row: dict) -> dict:
    return {"prompt": row["completion"], "completion": row["prompt"]}


def test_format_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own function is the way in for any other layout of rows."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    rows = load_rows(Source(path=write(tmp_path, "jsonl"), format="test_data_load:swapped"))
    assert rows["prompt"] == ["went", "sang"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.jsonl", None, "no file .*absent.jsonl; data files beside it: other.jsonl"),
        ("othr.jsonl", None, "no file .*did you mean other.jsonl"),
        ("a/b/c.jsonl", None, "there is no folder"),
        ("rows.txt", "go went", r"ends in '.txt'; expected one of .json"),
        ("empty.jsonl", "", "empty data set"),
        ("empty.json", "[]", "empty|at least one row"),
        ("empty.csv", "prompt,completion\n", "empty data set"),
        ("empty.yaml", "[]", "empty data set"),
        ("cut.jsonl", '{"prompt": "go", "compl', "cut.jsonl: .*damaged or truncated"),
        ("cut.yaml", "- {prompt: go", "can't be read"),
        ("map.yaml", "prompt: go", "holds dict at the top; expected a list of rows"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    """A traceback of Arrow or pandas doesn't say which file of a recipe is at fault."""
    jsonl(tmp_path / "other.jsonl", PAIRS)
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_rows(Source(path=str(tmp_path / name)))


def test_reasoning_gym_is_deterministic_unique_and_scored() -> None:
    """Repeated questions would stand in training and evaluation at once; other ones at each start can't be resumed."""
    pytest.importorskip("reasoning_gym")
    source = Source(path="reasoning_gym:letter_counting", size=20, seed=3, options={"max_words": 6})
    rows = list(load_rows(source))
    assert rows == list(load_rows(source))
    assert len({row["prompt"] for row in rows}) == 20
    assert all(row["completion"] == row["answer"] and row["answer"].isdigit() for row in rows)


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("leter_counting", {}, "no task 'leter_counting'; did you mean letter_counting"),
        ("zzzzqqqq", {}, r"no task 'zzzzqqqq'; it has .*, \.\.\."),
        ("letter_counting", {"max_word": 3}, "no option 'max_word'; did you mean max_words"),
        ("letter_counting", {"seed": 3}, "set size and seed beside options"),
        ("letter_counting", {"max_words": 0}, "are refused"),
    ],
)
def test_reasoning_gym_errors_name_what_is_near(task: str, options: dict, words: str) -> None:
    """A misspelt task among a hundred needs the near ones, not a stack trace."""
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=words):
        load_rows(Source(path=f"reasoning_gym:{task}", options=options, size=3))


def test_too_few_different_questions_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small task asked for many rows must not repeat itself in silence."""
    factory = pytest.importorskip("reasoning_gym.factory")
    items = [
        {"question": f"heads or  {'Tails' if n % 2 else 'tails'}, {n % 6 // 2}?", "answer": "x"} for n in range(24)
    ]
    monkeypatch.setattr(factory, "create_dataset", lambda task, **settings: items)
    assert len(load_rows(Source(path="reasoning_gym:coin_flip", size=3))) == 3
    with pytest.raises(ValueError, match="only 3 different questions in 24; lower size, which is 6"):
        load_rows(Source(path="reasoning_gym:coin_flip", size=6))
    items[0]["answer"] = None
    with pytest.raises(ValueError, match="gives no answer to 'heads or"):
        load_rows(Source(path="reasoning_gym:coin_flip", size=3))


def test_missing_reasoning_gym_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional; its absence must say how to get it."""
    real = builtins.__import__

    def without(name: str, *rest: object, **named: object) -> object:
        if name.startswith("reasoning_gym"):
            raise ImportError("No module named 'reasoning_gym'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        load_rows(Source(path="reasoning_gym:letter_counting"))


def test_a_conversation_that_waits_for_its_answer_is_a_row_where_answers_are_written(tmp_path):
    """On-policy rows are prompts: a file of conversations that end with the user's turn couldn't be used."""
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    (row,) = load_rows(Source(str(path)), require_completion=False)
    assert [turn["content"] for turn in row["messages"]] == ["a", "b", "c"] and row.get("answer") is None
    with pytest.raises(ValueError, match="expected 'assistant'"):
        load_rows(Source(str(path)))
