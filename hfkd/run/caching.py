"""Builds the cache of a recipe's teacher: its texts, its teacher run over them once, and what is said on the way.

Several processes share the shards; the first one alone prints and closes the manifest. How shards are written is
`hfkd.cache`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hfkd.batch import Batch, View
from hfkd.cache import CacheError, CacheWriter, Codec, Hidden, Manifest, clear_cache, compare, texts_of
from hfkd.cache.folder import alone_in, is_full, remove_notes, size_in_words
from hfkd.cache.format import MANIFEST_NAME
from hfkd.compatibility import check_readers_of_draws
from hfkd.data.prompts import PromptBuilder
from hfkd.files import write_whole
from hfkd.loading import load_config_of, readable
from hfkd.recipe.schema import Recipe
from hfkd.rows import DenseRows, Head, input_device
from hfkd.run.build import Run, settings_of
from hfkd.run.evaluation import movable
from hfkd.run.expected import expected_contract, loss_temperature, teacher_contract
from hfkd.run.models import load_student, load_tokenizer, make_teacher, prepare_teacher
from hfkd.run.rows import load_data
from hfkd.run.texts import ANSWERS_NAME, answered_rows, fitting, make_dataset, visited_rows
from hfkd.sharding import Launch
from hfkd.signal import DISTRIBUTION, STATES
from hfkd.student import check_head

if TYPE_CHECKING:
    from hfkd.data.views import DistillationDataset
    from hfkd.teachers import Teacher

_REMEDY = "Choose another folder with --out, or delete this cache with --overwrite."


def build_cache(
    recipe: Recipe,
    out: str | Path,
    codec: Codec,
    *,
    temperature: float | None = None,
    batch_size: int = 16,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Run a recipe's teacher over all its texts and keep what it says.

    Args:
        recipe: From `load_recipe`; its `teacher.cache` plays no part.
        out: The folder of the cache. A build that was interrupted there goes on.
        codec: What is kept of a distribution.
        temperature: At which distributions are taken; None takes that of the recipe's terms. `hidden` needs none.
        batch_size: Texts that are run together.
        overwrite: Delete what is there first.
        console: Where the first process prints; None prints to the terminal.

    Returns:
        The manifest of the finished cache.

    Raises:
        CacheError: The folder holds another cache, another build runs there, the codec can't keep such a teacher, or
            the disk is full.
        ValueError: The recipe or its data can't work, its teacher can't be cached, or its terms can't read the cache.
        OSError: A file is missing or damaged.
    """
    return _Build(recipe, Path(out), codec, temperature, batch_size, console).conduct(overwrite)


class _Build:
    """One build under way."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        codec: Codec,
        temperature: float | None,
        batch_size: int,
        console: Console | None,
    ) -> None:
        self.recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"cache": None})})
        self.out, self.codec, self.batch_size = out, codec, batch_size
        teacher_contract(self.recipe)  # refuses what can't be cached, before anything is loaded
        if self.recipe.data.answer not in ("dataset", "teacher"):
            raise ValueError(
                f"data.answer: {self.recipe.data.answer} has texts written at each step, and a cache holds texts that "
                "are known before; expected dataset or teacher"
            )
        self.run = _without_models(self.recipe)
        self._check_terms()
        codec.check(_student_vocabulary(self.recipe))
        self.temperature = self._choose_temperature(temperature)
        self.state = PartialState()
        first = self.state.is_main_process
        self.console = (console or Console()) if first else Console(quiet=True)

    def conduct(self, overwrite: bool) -> Manifest:
        """All stages in order, in a folder that no other build has meanwhile."""
        with ExitStack() as held:
            if overwrite or not self._is_complete():  # a finished cache may lie where nothing can be written
                self._on_first(lambda: held.enter_context(alone_in(self.out)))
            return self._build(overwrite)

    def _build(self, overwrite: bool) -> Manifest:
        if overwrite:
            self._clear()
        self._compare({"teacher": teacher_contract(self.recipe), **self._kept()})
        self.run.teacher = make_teacher(self.recipe)
        dataset = self._dataset()
        contract = {**expected_contract(self.run, dataset), **self._kept()}
        if self._compare(contract):
            self._say(f"The cache in {self.out} is already complete.")
            self._on_first(lambda: remove_notes(self.out))
            return Manifest.read(self.out)
        teacher = self._prepared()
        teacher.share_prefix(dataset.shared_prefix)
        writer = self._writer(dataset, contract)
        complete = writer.open()
        self._on_first(lambda: None if complete else writer.begin())
        if not complete:
            self._write(writer, teacher)
            self._on_first(writer.finish)
        return Manifest.read(self.out)

    def _write(self, writer: CacheWriter, teacher: Teacher) -> None:
        """Run the teacher over what is missing."""
        share = (self.state.process_index, self.state.num_processes)
        plan, own = writer.plan, writer.missing[share[0] :: share[1]]
        tokens = sum(sum(plan.tokens[place] for place in plan.shards[number]) for number in own)
        self._say(
            f"{len(plan.order)} texts, {sum(plan.tokens)} tokens, {len(writer.missing)} of {len(plan.shards)} shards "
            f"to write, up to {size_in_words(writer.token_bytes)} a token."
        )

        def speak(view: View) -> DenseRows:
            return teacher.signal(Batch(view), frozenset({DISTRIBUTION})).rows

        begun = time.perf_counter()
        with _bar(self.console, tokens) as report:
            writer.write(speak, share, report)
        took = max(time.perf_counter() - begun, 1e-9)
        self._say(f"{tokens} tokens in {took:.1f} s: {tokens / took:.0f} tokens per second and process.")

    def _dataset(self) -> DistillationDataset:
        """The views of all texts that are to be cached."""
        rows, dataset = fitting(self.run)
        if self.recipe.data.answer != "teacher":
            return dataset
        rows = visited_rows(self.run, rows)
        begun = (self.out / MANIFEST_NAME).exists()  # it is written when all answers are there
        if not begun:
            self._prepared()
        answered = answered_rows(self.run, rows, self.out, written=begun)
        if not begun:
            self._on_first(lambda: _sort_answers(self.out / ANSWERS_NAME))
        return make_dataset(self.run, answered, self.run.teacher, self.run.objective)

    def _prepared(self) -> Teacher:
        """The teacher, loaded when it is first needed."""
        run = self.run
        # Whole on each process: they read different numbers of texts, and shards must be run together.
        launch = Launch(run.config.device)
        if run.model is None and self.recipe.teacher.kind == "self":
            run.model = load_student(self.recipe, seed=run.config.seed)
            if movable(run.model):
                run.model.to(run.config.device)
            run.teacher.prepare(launch, run.model)
        elif run.model is None:
            run.model = torch.nn.Identity()  # the teacher is another model; the student's plays no part
            prepare_teacher(self.recipe, run.teacher, run.model, run.tokenizer, launch)
        return run.teacher

    def _writer(self, dataset: DistillationDataset, contract: dict[str, Any]) -> CacheWriter:
        texts = list(texts_of(dataset))
        with self.run.teacher.weights() as model, torch.no_grad():
            device = input_device(model)
            ids = torch.tensor([texts[0]["input_ids"]], device=device)
            check_head(model, View(ids, torch.ones_like(ids), ids))
            head, dtype = Head.of(model).detached(), model.dtype
        contract = {**contract, "teacher": teacher_contract(self.recipe)}  # its commit is known now
        return CacheWriter(
            self.out,
            texts,
            self.codec,
            contract,
            head.first(_student_vocabulary(self.recipe)),
            pad_token_id=self.run.tokenizer.pad_token_id,
            batch_size=self.batch_size,
            device=device,
            hidden_dtype=dtype,
        )

    def _check_terms(self) -> None:
        """Refuse a cache that the recipe's terms couldn't read.

        Raises:
            ValueError: Names them.
        """
        objective = self.run.objective
        if STATES in objective.needs:
            named = [term.name for term in objective.terms if STATES in term.loss.needs]
            raise ValueError(
                f"loss.terms: {named} read the states of the teacher's layers, and no cache holds those; leave them "
                "out, or train with the teacher itself"
            )
        if self.codec.drawn:
            check_readers_of_draws(objective)

    def _choose_temperature(self, wanted: float | None) -> float | None:
        """The temperature of the cache; none for hidden states, which serve any."""
        if isinstance(self.codec, Hidden):
            if wanted is not None:
                raise ValueError("--temperature: hidden states serve any temperature; leave it out")
            return None
        found = loss_temperature(self.run.objective) if wanted is None else wanted
        if isinstance(found, list):
            raise ValueError(
                f"loss.terms read the teacher at the temperatures {found}, and a cache of probabilities holds one; "
                "use --codec hidden, or give all terms the same"
            )
        if not 0 < found < float("inf"):
            raise ValueError(f"--temperature: got {found}; expected a number above 0")
        return float(found)

    def _kept(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "codec": self.codec.describe()}

    def _is_complete(self) -> bool:
        return (self.out / MANIFEST_NAME).exists() and Manifest.read(self.out).status == "complete"

    def _compare(self, contract: dict[str, Any]) -> bool:
        """Hold what is known against the cache that is there; whether that is complete."""
        if (self.out / MANIFEST_NAME).exists():
            compare(Manifest.read(self.out).contract, contract, self.out, _REMEDY)
        return self._is_complete()

    def _has_answers(self) -> bool:
        """Whether the cache that is there is one of a teacher's answers, which has no `data` in its contract."""
        try:
            return "data" not in Manifest.read(self.out).contract
        except CacheError:
            return False

    def _clear(self) -> None:
        """Delete the cache, and the answers that were written for it: a run's own may lie in the same folder."""

        def delete() -> None:
            answered = self._has_answers()
            if clear_cache(self.out) and answered:
                (self.out / ANSWERS_NAME).unlink(missing_ok=True)

        self._on_first(delete)

    def _on_first(self, work: Callable[[], Any]) -> None:
        """Let the first process do something while the others wait."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            work()
        self.state.wait_for_everyone()

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)


def _without_models(recipe: Recipe) -> Run:
    """Settings, rows and tokenizer of a recipe."""
    run = settings_of(recipe)
    run.take(load_data(recipe, run.sources))
    run.tokenizer = load_tokenizer(recipe.student)
    run.builder = PromptBuilder(run.tokenizer, run.style)
    return run


def _student_vocabulary(recipe: Recipe) -> int:
    """How many ids the student scores; what a teacher's padded vocabulary has beyond them is cut."""
    student = recipe.student
    located = {**student.load_kwargs, "revision": student.revision, "trust_remote_code": student.trust_remote_code}
    config = readable(lambda: load_config_of(student.origin, located), student.origin_key)
    return config.get_text_config().vocab_size


def _sort_answers(path: Path) -> None:
    """Bring the answers into an order that doesn't tell where a build was interrupted."""
    first, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    ordered = first + "".join(sorted(lines, key=lambda line: json.loads(line)["prompt"]))
    try:
        write_whole(path, ordered)
    except OSError as problem:
        if not is_full(problem):
            raise
        raise CacheError(
            f"The disk of {path.parent} is full: {size_in_words(len(ordered.encode()))} are needed to put the "
            "teacher's answers in order. All are written; make room and run the same command again."
        ) from problem


@contextmanager
def _bar(console: Console, tokens: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with tokens per second; yields what hears of tokens."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
    )
    with Progress(
        *columns, TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        task, begun, done = (
            progress.add_task("Teacher's distributions", total=tokens, speed=""),
            time.perf_counter(),
            0,
        )

        def report(count: int) -> None:
            nonlocal done
            done += count
            speed = done / max(time.perf_counter() - begun, 1e-9)
            progress.update(task, completed=done, speed=f"{speed:.0f} tokens/s")

        yield report
