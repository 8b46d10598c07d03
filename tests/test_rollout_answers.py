"""The teacher's answers on disk: written once, taken up where a run was killed, never mixed with another teacher's."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

from hfkd.rollout import Completion, GenerationSettings, HFRollout, Rollout, answers, teacher_answers
from hfkd.rollout.answers import AnswerFile, prompt_hash

FINGERPRINT = {"model": "tiny", "revision": "abc"}


TEACHER = nn.Identity()


class Echo(Rollout):
    """Answers a prompt with its own numbers, and remembers what it was asked."""

    def __init__(self, dies_after: int | None = None, settings: GenerationSettings | None = None) -> None:
        self.settings = settings or GenerationSettings()
        self.asked: list[list[int]] = []
        self.dies_after = dies_after

    def generate(self, model, prompts, description=None):
        """All at once."""
        return [completion for _, completion in self.stream(model, prompts, description)]

    def stream(self, model, prompts, description=None):
        """The last prompt first, as a rollout that sorts would."""
        assert model is TEACHER
        for index in reversed(range(len(prompts))):
            if self.dies_after is not None and len(self.asked) == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(prompts[index])
            yield index, Completion(prompts[index], f" {prompts[index]}\u2028é ", finished=True)


@contextmanager
def model_context():
    """Hands out the model."""
    yield TEACHER


def run(path: Path, prompts, rollout=None, fingerprint=FINGERPRINT):
    """Ask; rows are only counted."""
    return teacher_answers([{}] * len(prompts), prompts, rollout or Echo(), model_context, path, fingerprint)


PROMPTS = [[1, 2], [3], [4, 5, 6], [3]]
EXPECTED = [f"{prompt}\u2028é" for prompt in PROMPTS]


def test_answers_in_order_and_asked_once(tmp_path):
    """Prevents answers from landing at the wrong question, and equal prompts or a second run from costing twice."""
    path, first, second = tmp_path / "run" / "answers.jsonl", Echo(), Echo()
    assert run(path, PROMPTS, first) == EXPECTED
    assert sorted(first.asked) == [[1, 2], [3], [4, 5, 6]]
    assert run(path, PROMPTS[::-1], second) == EXPECTED[::-1]
    assert second.asked == []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert lines[0]["fingerprint"]["model"] == "tiny"
    assert {line["prompt"] for line in lines[1:]} == {prompt_hash(prompt) for prompt in PROMPTS}


@pytest.mark.parametrize("torn", ['{"prompt": "ab', "", '{"prompt": "ab", "text": "x", "finished": true}'])
def test_killed_run_goes_on_where_it_stopped(torn, tmp_path):
    """Prevents hours of generation from being lost, or a torn line from being read as an answer."""
    path, second = tmp_path / "answers.jsonl", Echo()
    with pytest.raises(KeyboardInterrupt):
        run(path, PROMPTS, Echo(dies_after=2))
    with path.open("a", encoding="utf-8") as stream:
        stream.write(torn)
    assert run(path, PROMPTS, second) == EXPECTED
    assert second.asked == [[1, 2]]
    third = Echo()
    assert run(path, PROMPTS, third) == EXPECTED and third.asked == []


def test_each_answer_is_on_disk_before_the_next(tmp_path):
    """Prevents a kill, which runs no clean-up, from taking answers along that were still in a buffer."""
    path, seen = tmp_path / "answers.jsonl", []

    class Watching(Echo):
        def stream(self, model, prompts, description=None):
            for answer in super().stream(model, prompts, description):
                seen.append(path.read_bytes().count(b"finished"))
                yield answer

    run(path, PROMPTS, Watching())
    assert seen == [0, 1, 2]


def test_torn_header_begins_anew(tmp_path):
    """Prevents a run that was killed in its first moment from blocking every later one."""
    path = tmp_path / "answers.jsonl"
    path.write_text('{"fingerpr')
    assert run(path, PROMPTS) == EXPECTED


def test_more_prompts_ask_only_for_the_new_ones(tmp_path):
    """Prevents a longer run in the same folder from asking again for what is known."""
    path, second = tmp_path / "answers.jsonl", Echo()
    run(path, PROMPTS[:2])
    assert run(path, PROMPTS, second) == EXPECTED
    assert second.asked == [[4, 5, 6]]


@pytest.mark.parametrize(
    ("fingerprint", "settings", "name"),
    [
        ({**FINGERPRINT, "revision": "def"}, GenerationSettings(), "revision: 'abc' there, 'def' now"),
        ({"model": "tiny"}, GenerationSettings(), "revision"),
        (FINGERPRINT, GenerationSettings(max_new_tokens=8), "generation.max_new_tokens"),
        (FINGERPRINT, GenerationSettings(stop=("\n",)), "generation.stop"),
        (FINGERPRINT, GenerationSettings(temperature=1.0), "generation.seed"),
    ],
)
def test_another_fingerprint_is_refused(fingerprint, settings, name, tmp_path):
    """Prevents training on answers of another model or setting; the message names the field and the way out."""
    path = tmp_path / "answers.jsonl"
    run(path, PROMPTS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Delete the file.*another output folder") as problem:
        run(path, PROMPTS, Echo(settings=settings), fingerprint)
    assert name in str(problem.value) and "model:" not in str(problem.value)
    assert path.read_bytes() == before


def test_batch_size_and_unused_seed_do_not_matter(tmp_path):
    """Prevents answers from being thrown away for a setting that doesn't change them."""
    path, second = tmp_path / "answers.jsonl", Echo(settings=GenerationSettings(batch_size=4, seed=9, top_p=0.5))
    run(path, PROMPTS, fingerprint={**FINGERPRINT, "shots": (1, 2), 3: Path("x")})
    run(path, PROMPTS, second, {**FINGERPRINT, "shots": [1, 2], 3: Path("x")})
    assert second.asked == []


def test_a_file_that_nobody_may_write_is_only_read(tmp_path):
    """Prevents a run from writing into the cache that it reads, or from a crash where that is forbidden."""
    path = tmp_path / "answers.jsonl"
    run(path, PROMPTS)
    with path.open("a") as stream:
        stream.write('{"torn')
    before = path.read_bytes()
    rows = [{}] * len(PROMPTS)
    assert teacher_answers(rows, PROMPTS, Echo(), None, path, FINGERPRINT) == EXPECTED
    with pytest.raises(ValueError, match="lacks the teacher's answers to 1 of 2 prompts, and nobody is there"):
        teacher_answers([{}] * 2, [[9], [3]], Echo(), None, path, FINGERPRINT)
    with pytest.raises(ValueError, match="lacks the teacher's answers"):
        teacher_answers(rows, PROMPTS, Echo(), None, tmp_path / "none" / "answers.jsonl", FINGERPRINT)
    assert path.read_bytes() == before and not (tmp_path / "none").exists()


def test_a_full_disk_says_where_and_how_much(tmp_path, monkeypatch):
    """Prevents a bare "No space left on device" that names no folder, and the loss of what was written."""
    path, append, second = tmp_path / "answers.jsonl", AnswerFile.append, Echo()

    def full(self, found):
        if not isinstance(found, BaseException):
            append(self, itertools.islice(found, 2))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "append", full)
        patch.setattr(AnswerFile, "append_failure", full)
        with pytest.raises(OSError, match=r"is full: 2 of .* written, 1 are missing.* KiB.*goes on") as problem:
            run(path, PROMPTS)
    assert str(tmp_path) in str(problem.value)
    assert run(path, PROMPTS, second) == EXPECTED and second.asked == [[1, 2]]


def test_damage_in_the_middle_is_an_error(tmp_path):
    """Prevents a damaged file, or one of somebody else's, from being cut off or overwritten in silence."""
    path = tmp_path / "answers.jsonl"
    run(path, PROMPTS)
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([lines[0], "garbage", *lines[2:]]), encoding="utf-8")
    with pytest.raises(ValueError, match="Line 2 .* is damaged"):
        run(path, PROMPTS)
    path.write_text('{"prompt": "my own data"}\n')
    with pytest.raises(ValueError, match="Line 1 .* is damaged"):
        run(path, PROMPTS)


def test_empty_and_cut_answers_are_kept_and_counted(tmp_path, caplog):
    """Prevents a teacher that says nothing, or never comes to an end, from going unnoticed."""

    class Poor(Echo):
        def stream(self, model, prompts, description=None):
            texts = [("  ", True), ("on and on", False), ("fine", True)]
            yield from ((i, Completion([], *text)) for i, text in enumerate(texts))

    with caplog.at_level(logging.WARNING):
        assert run(tmp_path / "answers.jsonl", PROMPTS[:3], Poor()) == ["", "on and on", "fine"]
    assert "3 answers 1 are empty and 1 didn't end" in caplog.text


def test_rows_and_prompts_must_pair_up(tmp_path):
    """Prevents answers from being shifted against their rows."""
    with pytest.raises(ValueError, match="2 rows and 1 prompts"):
        teacher_answers([{}, {}], [[1]], Echo(), model_context, tmp_path / "a.jsonl", {})
    assert run(tmp_path / "none.jsonl", []) == []
    assert not (tmp_path / "none.jsonl").exists()


def test_with_a_real_rollout(tmp_path, tokenizer, model):
    """Prevents the two halves from disagreeing on indices: batches are sorted by length, answers by row."""
    prompts = [tokenizer(text)["input_ids"] for text in ("Question: go", "yes", "the quick brown fox jumps")]
    rollout = HFRollout(tokenizer, GenerationSettings(max_new_tokens=5, batch_size=2))

    @contextmanager
    def context():
        yield model

    got = teacher_answers([{}] * 3, prompts, rollout, context, tmp_path / "a.jsonl", FINGERPRINT)
    assert got == [completion.text.strip() for completion in rollout.generate(model, prompts)]


class OneOf:
    """Stands in for `accelerate.PartialState` of one of two processes."""

    barrier: threading.Barrier
    local = threading.local()

    @property
    def is_main_process(self) -> bool:
        return self.local.rank == 0

    def wait_for_everyone(self) -> None:
        self.barrier.wait(timeout=10)


def run_both(path: Path, rollouts: list[Echo]) -> list:
    """Two processes as two threads; a failure comes back as its exception."""
    results: list = [None, None]
    OneOf.barrier = threading.Barrier(2)

    def work(rank: int) -> None:
        OneOf.local.rank = rank
        try:
            results[rank] = run(path, PROMPTS, rollouts[rank])
        except BaseException as problem:
            results[rank] = problem

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive(), "a process waits for ever"
    return results


def test_only_the_first_process_generates(tmp_path, monkeypatch):
    """Prevents two processes from writing into one file, and the second from training on other answers or none."""
    monkeypatch.setattr(answers, "PartialState", OneOf)
    monkeypatch.setattr(answers, "_POLL_SECONDS", 0.01)
    path, rollouts = tmp_path / "answers.jsonl", [Echo(), Echo()]
    assert run_both(path, rollouts) == [EXPECTED, EXPECTED]
    assert rollouts[1].asked == []


def test_a_model_in_shards_is_run_by_all(tmp_path, monkeypatch):
    """A process that only waited would leave the first one in a gathering of weights that never ends."""
    monkeypatch.setattr(answers, "PartialState", OneOf)
    monkeypatch.setattr(answers, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(answers, "is_sharded", lambda model: model is TEACHER)
    path, rollouts = tmp_path / "answers.jsonl", [Echo(), Echo()]
    assert run_both(path, rollouts) == [EXPECTED, EXPECTED]
    assert rollouts[1].asked == rollouts[0].asked != []
    assert len(path.read_text("utf-8").split("\n")) == len(rollouts[0].asked) + 2, "written once, behind the header"


def test_a_failure_reaches_the_other_processes(tmp_path, monkeypatch):
    """Prevents the others from waiting for ever for one that has failed, and its mark from blocking the next run."""
    monkeypatch.setattr(answers, "PartialState", OneOf)
    monkeypatch.setattr(answers, "_POLL_SECONDS", 0.01)
    path = tmp_path / "answers.jsonl"
    first, second = run_both(path, [Echo(dies_after=1), Echo()])
    assert isinstance(first, KeyboardInterrupt)
    assert isinstance(second, RuntimeError) and "KeyboardInterrupt" in str(second)
    assert run_both(path, [Echo(), Echo()]) == [EXPECTED, EXPECTED]
