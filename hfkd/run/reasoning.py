"""Asks the adapters of a run together: reads each one's recipe, loads all of them on one base, and asks until two ways
agree. Trains nothing; how they agree is `hfkd.adapters.loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.adapters import Reasoners, load_adapters, summary
from hfkd.adapters.loading import check_names
from hfkd.data.load import Source, load_rows
from hfkd.eval.answers import EXTRACTORS
from hfkd.files import write_json
from hfkd.masking import shareable
from hfkd.recipe import Recipe, load_recipe
from hfkd.rollout.base import GenerationSettings
from hfkd.run.against_teacher import without_accessories
from hfkd.run.build import make_config, make_style
from hfkd.run.evaluation import movable
from hfkd.run.models import load_student, load_tokenizer
from hfkd.run.provenance import MODEL, check_model

if TYPE_CHECKING:
    from hfkd.adapters import Outcome

_PARTS = ("recipe.yaml", "adapter_config.json")


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        intuitive: The adapter that answers at once.
        knowledge: The adapter that writes the rules that a question needs.
        deep: The adapter that answers with these rules before it.
        rounds: At most so many.
        extract: How an answer is read out of a text; None takes what the deep adapter's recipe says in `evaluation`,
            or `gsm8k`.
        model: The base, a hub id or a folder, where the recipes' own isn't here; None takes theirs.
        settings: How texts are drawn.
    """

    intuitive: str = "intuitive"
    knowledge: str = "knowledge"
    deep: str = "deep"
    rounds: int = 20
    extract: str | None = None
    model: str | None = None
    settings: GenerationSettings = GenerationSettings(max_new_tokens=256, temperature=1.0, top_p=0.9)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; expected at least 1")
        if self.settings.temperature == 0 and self.rounds > 1:
            raise ValueError(
                f"temperature is 0 and rounds is {self.rounds}: every round would write the same texts; sample "
                "(temperature above 0), or ask for 1 round"
            )
        if self.extract is not None and self.extract not in EXTRACTORS:
            raise ValueError(f"there is no extractor {self.extract!r} (known: {', '.join(EXTRACTORS)})")

    @property
    def roles(self) -> dict[str, str]:
        """The adapter by its role."""
        return {"intuitive": self.intuitive, "knowledge": self.knowledge, "deep": self.deep}


def find_adapters(folder: str | Path) -> dict[str, Path]:
    """The adapters of a run by their names: the folders below its own that hold one with its recipe.

    Args:
        folder: Of a run of several adapters.

    Raises:
        ValueError: It is no folder, or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected that of a run with adapters")
    found = {path.name: path for path in sorted(folder.iterdir()) if all((path / part).is_file() for part in _PARTS)}
    if not found:
        raise ValueError(
            f"no folder in {folder} holds {' and '.join(_PARTS)}; expected the folder of a finished run of a recipe "
            "with adapters"
        )
    return found


def read_questions(path: str, size: int | None = None) -> list[dict[str, Any]]:
    """Rows with `prompt`, and `answer` where they have one.

    Args:
        path: A file, a folder, or a data set of the hub; its rows have `question` or `prompt`.
        size: Take so many of them; None takes all.

    Raises:
        ValueError: There are none, or a row has no question.
    """
    source = Source(path, format="hfkd.adapters.rows:asked", size=size)
    return list(load_rows(source, require_completion=False))


def reason(
    folder: str | Path,
    rows: list[dict[str, Any]],
    asking: Asking,
    *,
    read: Callable[..., Recipe] = load_recipe,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Ask the adapters of a run.

    Args:
        folder: Of a run of several adapters.
        rows: With `prompt`, and `answer` where it is known.
        asking: Who is asked, and how.
        read: Reads the recipe of an adapter, given its path and overrides.
        json_path: Where the result is written.

    Returns:
        `asked` (how), `summary` (see `hfkd.adapters.loop.summary`, and `cut`: the share of texts that reached the
        limit of tokens) and `outcomes`, one for each row.

    Raises:
        ValueError: An adapter isn't there, or isn't on the same base as the others, or that base isn't the one that it
            was trained on.
        OSError: A file is missing or damaged.
    """
    known = find_adapters(folder)
    check_names(asking.roles, list(known))
    chosen = {name: known[name] for name in dict.fromkeys(asking.roles.values())}
    overrides = [] if asking.model is None else [f"student.model={asking.model}"]
    recipes = {name: read(path / "recipe.yaml", overrides) for name, path in chosen.items()}
    _check_base(recipes, chosen, asking.model is not None)
    extract = asking.extract or _extractor_of(recipes[asking.deep])
    reasoners = _load(recipes, chosen, asking.settings)
    questions = [row["prompt"] for row in rows]
    outcomes = reasoners.agree(questions, **asking.roles, max_rounds=asking.rounds, extract=extract)
    told = {"asked": asdict(replace(asking, extract=extract)), **_result(outcomes, rows)}
    told["summary"]["cut"] = reasoners.cut / reasoners.written
    if json_path is not None:
        write_json(json_path, shareable(told))
    return told


def _result(outcomes: list[Outcome], rows: list[dict[str, Any]]) -> dict[str, Any]:
    golds = [row.get("answer") for row in rows]
    return {
        "summary": summary(outcomes, golds),
        "outcomes": [{**found.to_dict(), "gold": gold} for found, gold in zip(outcomes, golds, strict=True)],
    }


def _load(recipes: Mapping[str, Recipe], folders: Mapping[str, Path], settings: GenerationSettings) -> Reasoners:
    """One base with all adapters on it, where the recipes run."""
    recipe = without_accessories(next(iter(recipes.values())))
    bare = recipe.model_copy(update={"student": recipe.student.model_copy(update={"lora": None})})
    tokenizer = load_tokenizer(recipe.student)
    model = load_adapters(load_student(bare, seed=0), folders)
    if movable(model):
        model.to(make_config(recipe).device)
    styles = {name: make_style(one) for name, one in recipes.items()}
    return Reasoners(model, tokenizer, styles, settings)


def _check_base(recipes: Mapping[str, Recipe], folders: Mapping[str, Path], is_chosen: bool) -> None:
    """See that all adapters are on one base, and that it is the one they were trained on, as far as that is known.

    Raises:
        ValueError: They aren't, or it isn't.
    """
    bases = {name: recipe.student.model_dump(exclude={"lora"}) for name, recipe in recipes.items()}
    (first, base), *others = bases.items()
    for name, other in others:
        if differ := [key for key in base if base[key] != other[key]]:
            key = differ[0]
            raise ValueError(
                f"the adapters {first} and {name} aren't on one base: student.{key} is {base[key]!r} and "
                f"{other[key]!r}; ask adapters of one recipe"
            )
    for name, recipe in recipes.items():
        faults = check_model(folders[name], recipe, {MODEL})
        if faults and not is_chosen:
            raise ValueError(
                f"{name}: {faults[0]}; start from the folder that the run was started in, or give the base with "
                "--model"
            )


def _extractor_of(recipe: Recipe) -> str:
    return "gsm8k" if recipe.evaluation is None else recipe.evaluation.extract
