"""Whose answers an evaluation takes: the model as it is published (`before`), and with what was trained (`after`).

Says where weights are, whether they are still the same, and loads them. What they are asked is `hfkd.run.evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.eval.results import fingerprint_of
from hfkd.files import file_digest
from hfkd.loading import commit_of, load_adapter, load_config_of, readable
from hfkd.recipe.schema import Recipe, StudentSection, TeacherSection
from hfkd.run.expected import deciding
from hfkd.run.models import load_student

if TYPE_CHECKING:
    from torch import nn

_DECIDING_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "*config.json", "*.py", "*.jinja"),
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
)
# Of a model's loading arguments those that say where in a folder or repository its files are.
_PLACES = ("gguf_file", "subfolder", "variant")


@dataclass(frozen=True)
class Subject:
    """One model of an evaluation.

    Attributes:
        stage: `before` or `after`, as in the report of a run.
        recipe: Its `student` says what is loaded.
        adapter: The folder of the adapter that is put on it, or None.
    """

    stage: str
    recipe: Recipe
    adapter: Path | None = None

    @property
    def trained(self) -> bool:
        """Whether its weights are a run's."""
        return self.stage == "after"

    def weights(self) -> dict[str, Any]:
        """What decides what it says, as plain data without a path: files with sizes and digests, or a hub revision."""
        student = self.recipe.student
        settings = student.model_dump(mode="json", include={"dtype", "attn_implementation", "init"})
        if settings["init"] is not None:
            del settings["init"]["source"]
        found = {**settings, "load_kwargs": deciding(student.model_dump(mode="json")["load_kwargs"])}
        found["model"] = identity(student.origin, student)
        if self.adapter is not None:
            found["adapter"] = _files(self.adapter)
        return found

    def load(self, fresh_adapter: bool = False) -> nn.Module:
        """Load it.

        Args:
            fresh_adapter: Put an untrained adapter on a model that has none where the recipe has one; it changes
                nothing that the model says.

        Raises:
            OSError: A file is missing or damaged.
        """
        recipe = self.recipe
        if not (fresh_adapter and self.adapter is None):
            student = recipe.student.model_copy(update={"lora": None})
            recipe = recipe.model_copy(update={"student": student})
        model = load_student(recipe, seed=int(recipe.training.get("seed", 42)))
        return model if self.adapter is None else load_adapter(model, self.adapter)


def find_subjects(recipe: Recipe, trained: Path | None, base: bool) -> list[Subject]:
    """The models to evaluate.

    Args:
        recipe: Says what the model was before.
        trained: A folder with an adapter, or with all weights of a model; None takes the model as it is published.
        base: Take that one, too.

    Raises:
        ValueError: The folder holds neither, or `base` is asked for and nothing is trained.
    """
    published = Subject("before", recipe)
    if trained is None:
        if base:
            raise ValueError(
                "--base puts the model as it is published beside a trained one, and none is given; give --adapter or "
                "the folder of a run, or leave --base out"
            )
        return [published]
    return [*([published] if base else []), _trained(recipe, trained)]


def identity(name: str, section: StudentSection | TeacherSection) -> dict[str, Any]:
    """What tells a model's files from others: each one's name, size and digest; of a hub id the commit."""
    if Path(name).exists():
        folder = Path(name)
        inner = section.load_kwargs.get("subfolder")
        return {"files": {**_files(folder), **(_files(folder / inner) if inner else {})}}
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code, **section.load_kwargs}
    readable(lambda: load_config_of(name, options), f"the configuration of {name}")  # as it is on the hub today
    return {"id": name, "revision": section.revision, "commit": commit_of(name, options)}


def _trained(recipe: Recipe, folder: Path) -> Subject:
    if (folder / "adapter_config.json").is_file():
        return Subject("after", recipe, folder)
    if not ((folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))):
        raise ValueError(
            f"{folder} has no weights: neither adapter_config.json beside an adapter, nor config.json beside "
            "model.safetensors; expected the folder of a run that came to its end"
        )
    kept = {key: value for key, value in recipe.student.load_kwargs.items() if key not in _PLACES}
    changes: Mapping[str, Any] = {"model": str(folder), "init": None, "lora": None, "revision": None}
    student = recipe.student.model_copy(update={**changes, "load_kwargs": kept})
    return Subject("after", recipe.model_copy(update={"student": student}))


def _files(folder: Path) -> dict[str, list[Any]]:
    """Size and digest by name."""
    if folder.is_file():
        return {folder.name: _digest(folder)}
    paths = {path for pattern in _DECIDING_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.name: _digest(path) for path in sorted(paths)}


def _digest(path: Path) -> list[Any]:
    return [path.stat().st_size, file_digest(path)]


def weights_fingerprint(subject: Subject) -> str:
    """16 hex digits for `Subject.weights`."""
    return fingerprint_of(subject.weights())
