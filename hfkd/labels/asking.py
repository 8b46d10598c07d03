"""Many questions to one endpoint: asked again where there is hope, counted, paced, kept in the ledger, and stopped
when it is no use or too dear.

What a text must look like is told by whoever asks; what happens with the answers is known elsewhere.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

from hfkd.labels.endpoint import EndpointError, Fault, Reply
from hfkd.labels.ledger import Entry, Ledger, Totals, question_key
from hfkd.labels.pace import Pace
from hfkd.labels.plan import EndpointSection, GenerationSection
from hfkd.labels.templates import FormatError

_LONGEST_BACKOFF = 60.0
_OF_THE_TEXT = ("format", "empty", "cut")  # another text of the same teacher may be better
_OF_THE_QUESTION = ("refused", *_OF_THE_TEXT)  # they say nothing of the next question


class Speaker(Protocol):
    """What is asked: `hfkd.labels.endpoint.Endpoint`."""

    def ask(self, messages: Sequence[Mapping[str, Any]], generation: GenerationSection) -> Reply:
        """Ask once; raises Fault or EndpointError."""


class _Stopped(Exception):
    """Another thread has found that nothing more is to be asked."""


@dataclass(frozen=True)
class Question:
    """What is asked, and how the text is read.

    Attributes:
        messages: The conversation.
        read: From the text to what is wanted; raises FormatError.
        sample: Which of several texts to the same conversation this is.
        generation: How the text is written; None as the plan's labels are.
    """

    messages: Sequence[Mapping[str, Any]]
    read: Callable[[str], Any]
    sample: int = 0
    generation: GenerationSection | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a question.

    Attributes:
        value: What `read` made of the text; None where there is none.
        kind: `answered`, or the kind of the last fault.
        words: The last fault in words, and the last text that couldn't be read.
    """

    value: Any
    kind: str = "answered"
    words: str = ""


class Asker:
    """Asks questions until each is answered or given up.

    Args:
        speaker: The endpoint.
        ledger: What is known, and where answers go.
        settings: Attempts, threads, waits, price and budget.
        generation: How texts are written, unless a question says otherwise.
        pace: Holds requests back.
        say: Takes a line of progress.

    Attributes:
        reused: Questions that the ledger had an answer to.
        run: Sums over what this run asked.
    """

    def __init__(
        self,
        speaker: Speaker,
        ledger: Ledger,
        settings: EndpointSection,
        generation: GenerationSection,
        pace: Pace | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.speaker, self.ledger, self.settings, self.generation = speaker, ledger, settings, generation
        self._stop = threading.Event()
        self.pace = pace or Pace(settings.requests_per_minute, settings.tokens_per_minute, sleep=self._stop.wait)
        self.say = say
        self.reused = 0
        self.run = Totals()
        self._lock = threading.Lock()
        self._failures = 0

    def ask_all(self, questions: Sequence[Question], what: str) -> list[Outcome]:
        """Ask, several at a time; equal questions once.

        Args:
            questions: In any number.
            what: What they are, for the progress.

        Returns:
            An outcome for each, in their order.

        Raises:
            EndpointError: The endpoint can't be used, too many questions in a row failed, or the budget is spent. All
                answers so far are in the ledger.
        """
        keys = [self._key(question) for question in questions]
        outcomes = {key: known for key, one in zip(keys, questions, strict=True) if (known := self._known(key, one))}
        self.reused += len(outcomes)
        missing = {key: one for key, one in zip(keys, questions, strict=True) if key not in outcomes}
        if outcomes:
            self.say(f"{what}: {len(outcomes)} are in the ledger, {len(missing)} are asked")
        pool = ThreadPoolExecutor(self.settings.parallel, thread_name_prefix="hfkd-label")
        running = {pool.submit(self._ask, key, question): key for key, question in missing.items()}
        try:
            for done, future in enumerate(as_completed(running), 1):
                outcomes[running[future]] = future.result()
                if done == len(running) or done % max(1, len(running) // 10) == 0:
                    self.say(self._progress(what, done, len(running)))
        except BaseException as error:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise self._first(running, error) from None
        pool.shutdown()
        # Of equal questions each reads the text for itself.
        return [self._known(key, one) or outcomes[key] for key, one in zip(keys, questions, strict=True)]

    def cost(self) -> float | None:
        """What all lines of the ledger cost, by the plan's price; None where it names none."""
        price = self.settings.price
        if price is None:
            return None
        totals = self.ledger.totals
        return (totals.prompt_tokens * price.prompt + totals.completion_tokens * price.completion) / 1e6

    def _key(self, question: Question) -> str:
        written = self._written(question).model_dump()
        return question_key(self.settings.model, question.messages, written, question.sample)

    def _written(self, question: Question) -> GenerationSection:
        return question.generation or self.generation

    def _known(self, key: str, question: Question) -> Outcome | None:
        entry = self.ledger.answers.get(key)
        try:
            return None if entry is None else Outcome(question.read(entry.text))
        except FormatError:
            return None  # the template reads texts in another way now

    def _ask(self, key: str, question: Question) -> Outcome:
        try:
            return self._attempt(Entry(key), question)
        except EndpointError:
            self._stop.set()  # before this thread takes another question
            raise

    def _attempt(self, entry: Entry, question: Question) -> Outcome:
        last = ""
        try:
            for attempt in range(self.settings.attempts):
                self._may_ask()
                entry.attempts += 1
                try:
                    return self._answered(entry, question, attempt)
                except Fault as fault:
                    last, entry.reason = fault.kind, str(fault)
                    self._count(entry, fault)
                    if not fault.again:
                        break
                    if attempt + 1 < self.settings.attempts:
                        self._wait(fault, attempt)
                except FormatError as error:
                    last, entry.reason = "format", f"format: {error}"
                    entry.faults["format"] = entry.faults.get("format", 0) + 1
        except (_Stopped, EndpointError):
            if entry.attempts:
                self._write(entry)  # what it cost so far counts
            raise
        return self._given_up(entry, last)

    def _answered(self, entry: Entry, question: Question, attempt: int) -> Outcome:
        """One attempt: warmer after a bad text, and as before where only the endpoint failed."""
        wanted, again = self._written(question), any(kind in entry.faults for kind in _OF_THE_TEXT)
        temperature = max(wanted.temperature, wanted.temperature_again) if again else wanted.temperature
        seed = None if wanted.seed is None else wanted.seed + 1000 * question.sample + attempt
        wanted = wanted.model_copy(update={"temperature": temperature, "seed": seed})
        reply = self.speaker.ask(question.messages, wanted)
        self._tokens(entry, (reply.prompt_tokens, reply.completion_tokens))
        entry.malformed = reply.text
        value = question.read(reply.text)
        entry.text, entry.malformed, entry.reason = reply.text, None, ""
        self._write(entry)
        with self._lock:
            self._failures = 0
        return Outcome(value)

    def _given_up(self, entry: Entry, kind: str) -> Outcome:
        """Note it, and stop at too many in a row.

        A run that is repeated asks again what was given up before, one after the other now, however far apart they
        are in the source: such a question counts only while the endpoint answers none.
        """
        before = self.ledger.failed.get(entry.key, set())
        again = kind in _OF_THE_QUESTION and not before.isdisjoint(_OF_THE_QUESTION)
        expected = again and bool(self.ledger.answers)
        self._write(entry)
        with self._lock:
            self._failures += not expected
            failures = self._failures
        if not expected and failures >= self.settings.give_up_after:
            raise EndpointError(
                f"{failures} questions in a row were given up; the last: {entry.reason}. What was answered is kept; "
                "mend the endpoint or the template and run the same command again (endpoint.give_up_after: "
                f"{self.settings.give_up_after})."
            )
        text = f"; it wrote: {entry.malformed[:200]!r}" if kind == "format" and entry.malformed else ""
        return Outcome(None, kind, entry.reason + text)

    def _may_ask(self) -> None:
        """Wait for the pace.

        Raises:
            _Stopped: Nothing more is to be asked.
            EndpointError: The budget is spent.
        """
        self.pace.wait(self._stop.is_set)
        if self._stop.is_set():
            raise _Stopped
        budget, cost = self.settings.budget, self.cost()
        if budget is not None and cost is not None and cost >= budget:
            raise EndpointError(
                f"The budget is spent: {cost:.4f} of {budget:g} (endpoint.budget). What was answered is kept; raise "
                "it and run the same command again."
            )

    def _wait(self, fault: Fault, attempt: int) -> None:
        """Wait as long as the endpoint asks, everybody; else longer with each attempt, this thread alone.

        Raises:
            EndpointError: It asks for longer than the plan allows.
        """
        if fault.kind in ("malformed", "empty", "cut"):
            return
        if fault.retry_after is not None:
            if fault.retry_after > self.settings.longest_wait:
                raise EndpointError(
                    f"{self.settings.url} asks to wait {fault.retry_after:.0f} seconds ({fault}); what was answered "
                    "is kept. Run the same command again then, or raise endpoint.longest_wait."
                )
            self.pace.hold(fault.retry_after)
            return
        backoff = min(_LONGEST_BACKOFF, self.settings.backoff * 2**attempt) * random.uniform(0.5, 1.0)
        if fault.kind == "rate_limit":
            self.pace.hold(backoff)
        else:
            self._stop.wait(backoff)

    def _count(self, entry: Entry, fault: Fault) -> None:
        entry.faults[fault.kind] = entry.faults.get(fault.kind, 0) + 1
        self._tokens(entry, fault.usage)

    def _tokens(self, entry: Entry, usage: tuple[int | None, int | None]) -> None:
        entry.uncounted += None in usage
        entry.prompt_tokens += usage[0] or 0
        entry.completion_tokens += usage[1] or 0
        self.pace.spend(sum(count or 0 for count in usage))

    def _write(self, entry: Entry) -> None:
        with self._lock:
            self.run.add(entry)
        self.ledger.append(entry)

    def _first(self, running: Mapping[Any, str], error: BaseException) -> BaseException:
        """The error that stopped the others, if this one says only that it was stopped."""
        if not isinstance(error, _Stopped):
            return error
        errors = [future.exception() for future in running if future.done() and not future.cancelled()]
        return next((one for one in errors if one is not None and not isinstance(one, _Stopped)), error)

    def _progress(self, what: str, done: int, total: int) -> str:
        faults = Counter(self.run.faults)
        again = ", ".join(f"{count} x {kind}" for kind, count in sorted(faults.items()))
        cost = self.cost()
        parts = [
            f"{what}: {done}/{total}",
            f"faults: {again}" if again else "",
            "" if cost is None else f"cost {cost:.4f}",
        ]
        return "; ".join(part for part in parts if part)
