"""The teacher's own answers as training targets, written once and kept beside the run.

The file is JSON lines: a header with the fingerprint of everything that decides the answers, then one line for each
distinct prompt. Lines are flushed as they come, so a run that was killed goes on where it stopped. Knows nothing of
what the prompts say or of who answers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from hfkd.rollout.base import Completion, Rollout
from hfkd.sharding import is_sharded

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


def teacher_answers(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[list[int]],
    rollout: Rollout,
    model_context: Callable[[], AbstractContextManager[nn.Module]] | None,
    path: Path,
    fingerprint: Mapping[str, Any],
    writer: str = "teacher",
) -> list[str]:
    """Have the teacher answer each prompt, or read what it answered before.

    With several processes the first one generates and the others wait for its file, which must lie where all of them
    can read it. Where the model is sharded, all run it, and the first one writes.

    Args:
        rows: The examples, one for each prompt.
        prompts: Token ids of what the teacher reads.
        rollout: Generates.
        model_context: Makes a context manager that yields the model with the teacher's weights in force; entered only
            if an answer is missing. None where nobody can answer: the file is read and never changed.
        path: The JSONL file; its folder is made if need be.
        fingerprint: What decides the answers besides the prompt (model, revision, ...), as JSON values. The rollout's
            settings are added.
        writer: Who answers, for messages.

    Returns:
        The answers in the order of the prompts, without surrounding white space. Equal prompts have equal answers. An
        answer may be empty, or cut at the limit of tokens; how many are is logged.

    Raises:
        ValueError: The file was written under another fingerprint, a whole line of it is damaged, or an answer is
            missing and there is no model.
        OSError: The disk is full; says how many answers lie there.
        RuntimeError: The process that generates has failed (raised in the others).
    """
    if len(rows) != len(prompts):
        raise ValueError(f"There are {len(rows)} rows and {len(prompts)} prompts; expected one prompt for each row.")
    if not prompts:
        return []
    path = Path(path)
    keys = [prompt_hash(prompt) for prompt in prompts]
    file = AnswerFile(path, _with_settings(fingerprint, rollout), writer)
    file.read()  # on every process, so that a wrong fingerprint stops all of them
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in file.answers}
    if missing and model_context is None:
        raise ValueError(
            f"{path} lacks the teacher's answers to {len(missing)} of {len(prompts)} prompts, and nobody is there to "
            "write them. Build the cache with the number of steps, the batch size and the number of processes that "
            "the run has, or use `answer: dataset`."
        )
    _fill(file, missing, rollout, model_context)
    answers = [file.answers[key] for key in keys]
    if PartialState().is_main_process:
        _report(answers, writer)
    return [text for text, _ in answers]


def prompt_hash(ids: Sequence[int]) -> str:
    """Name a prompt by its tokens: SHA-256 over the ids, in hex."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


class AnswerFile:
    """A JSONL file of answers: header, lines, and what is known of them in memory.

    Args:
        path: The file.
        fingerprint: What its answers depend on.
        writer: Whose they are, for messages.

    Attributes:
        answers: `(text, finished)` by prompt hash.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], writer: str = "teacher") -> None:
        self.path, self.writer = path, writer
        self.fingerprint = json.loads(json.dumps(fingerprint, default=str))  # as it will read back
        self.answers: dict[str, tuple[str, bool]] = {}
        self._whole_bytes = 0

    def read(self) -> None:
        """Read what is there; a missing file holds nothing, and a line that was torn at the end isn't counted.

        Raises:
            ValueError: The fingerprint is another, or a whole line is damaged.
        """
        self._whole_bytes = 0
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                if "failed" in record:
                    return
                self._take(record, number)
            except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as problem:
                raise ValueError(
                    f"Line {number} of {self.path} is damaged ({line[:60]!r}). Expected the teacher's answers as JSON "
                    "lines; delete the file to have them generated anew, or choose another output folder."
                ) from problem
            self._whole_bytes += len(line)

    def repair(self) -> None:
        """Cut off what an interrupted run left at the end, and write the header into a new file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._whole_bytes:
            os.truncate(self.path, self._whole_bytes)
            return
        self.answers.clear()
        self.path.write_text(_line({"fingerprint": self.fingerprint}), encoding="utf-8")

    def append(self, answers: Iterable[tuple[str, Completion]]) -> None:
        """Write answers as they come, each one flushed at once.

        Args:
            answers: `(prompt hash, completion)`.
        """
        with self.path.open("a", encoding="utf-8") as stream:
            for key, completion in answers:
                answer = (completion.text.strip(), completion.finished)
                stream.write(_line({"prompt": key, "text": answer[0], "finished": answer[1]}))
                stream.flush()
                self.answers[key] = answer

    def append_failure(self, problem: BaseException) -> None:
        """Tell the processes that wait for this file that nothing more will come."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line({"failed": f"{type(problem).__name__}: {problem}"}))

    def failure(self) -> str | None:
        """What `append_failure` wrote, if the file ends with it."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        if not lines or not lines[-1].endswith(b"\n"):
            return None
        return json.loads(lines[-1]).get("failed")

    def _take(self, record: dict[str, Any], number: int) -> None:
        if number == 1:
            self._compare(record["fingerprint"])
        else:
            self.answers[record["prompt"]] = (record["text"], record["finished"])

    def _compare(self, stored: dict[str, Any]) -> None:
        ours = self.fingerprint
        names = sorted(name for name in stored.keys() | ours.keys() if stored.get(name) != ours.get(name))
        if not names:
            return
        fields = "; ".join(f"{name}: {stored.get(name)!r} there, {ours.get(name)!r} now" for name in names)
        raise ValueError(
            f"{self.path} holds a teacher's answers that were made under other conditions ({fields}). Delete the file "
            "to generate them anew, or choose another output folder."
        )


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _with_settings(fingerprint: Mapping[str, Any], rollout: Rollout) -> dict[str, Any]:
    """Add the settings that decide the answers: no batch size, and no sampling settings where nothing is sampled."""
    settings = getattr(rollout, "settings", None)
    if settings is None:
        return dict(fingerprint)
    names = ["max_new_tokens", "stop", "temperature"] + (["top_p", "seed"] if settings.temperature > 0 else [])
    return {**fingerprint, **{f"generation.{name}": getattr(settings, name) for name in names}}


def _fill(
    file: AnswerFile,
    missing: Mapping[str, list[int]],
    rollout: Rollout,
    model_context: Callable[[], AbstractContextManager[nn.Module]] | None,
) -> None:
    """Let the first process answer what is missing, while the others wait for its file."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process and missing:
        with _room(file, missing):
            file.repair()
    state.wait_for_everyone()
    if state.is_main_process and missing:
        with _room(file, missing):
            _generate(missing, rollout, model_context, file)
    elif missing and _needs_all(model_context):
        with model_context() as model:
            for _ in rollout.stream(model, list(missing.values())):
                pass  # this process lends its shards; what is said is written by the first one
    if not state.is_main_process:
        _wait_for(file, missing)
    state.wait_for_everyone()


def _needs_all(model_context: Callable[[], AbstractContextManager[nn.Module]]) -> bool:
    """Whether the model's weights are spread over the processes, so that all must run it."""
    with model_context() as model:
        return is_sharded(model)


def _generate(
    missing: Mapping[str, list[int]],
    rollout: Rollout,
    model_context: Callable[[], AbstractContextManager[nn.Module]],
    file: AnswerFile,
) -> None:
    keys = list(missing)
    if file.answers:
        logger.info("%s holds %d answers; %d are missing.", file.path, len(file.answers), len(keys))
    try:
        with (
            model_context() as model,
            closing(rollout.stream(model, list(missing.values()), f"{file.writer.capitalize()}'s answers")) as stream,
        ):
            file.append((keys[index], completion) for index, completion in stream)
    except BaseException as problem:
        with suppress(OSError):  # a full disk takes no note of it either
            file.append_failure(problem)
        raise


@contextmanager
def _room(file: AnswerFile, keys: Iterable[str]) -> Iterator[None]:
    """Say of a disk that fills up how many answers it holds, and about how much the others need."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        missing = len(set(keys) - file.answers.keys())
        size = file.path.stat().st_size / max(1, len(file.answers)) if file.path.exists() else 0
        raise OSError(
            f"The disk of {file.path.parent} is full: {len(file.answers)} of the {file.writer}'s answers are written, "
            f"{missing} are missing and need about {missing * size / 1024:.0f} KiB. Make room and run the same "
            "command again, it goes on from there."
        ) from problem


def _wait_for(file: AnswerFile, missing: Mapping[str, list[int]]) -> None:
    """Look at the file now and then; a collective would time out long before a large set is answered."""
    while True:
        file.read()
        if not missing.keys() - file.answers.keys():
            return
        failure = file.failure()
        if failure is not None:
            raise RuntimeError(f"The first process couldn't generate the teacher's answers: {failure}")
        time.sleep(_POLL_SECONDS)


def _report(answers: Sequence[tuple[str, bool]], writer: str) -> None:
    empty = sum(not text for text, _ in answers)
    unfinished = sum(not finished for _, finished in answers)
    if not empty and not unfinished:
        logger.info("The %s has answered %d prompts.", writer, len(answers))
        return
    logger.warning(
        "Of the %s's %d answers %d are empty and %d didn't end within the limit of new tokens. If "
        "there are many, raise max_new_tokens or look at the prompt and the stop strings.",
        writer,
        len(answers),
        empty,
        unfinished,
    )
