"""A cache small enough for every test: texts, a teacher's cache of them, and what a folder holds. Shared by the tests
of the cache and by the builds that they kill.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_model, make_tokenizer
from training import DEMONSTRATIONS, ROWS

from hfkd import PromptStyle
from hfkd.batch import Batch, View
from hfkd.cache import CacheWriter, Codec, Manifest, texts_of
from hfkd.cache.contract import text_contract
from hfkd.data import DistillationDataset, PromptBuilder
from hfkd.rows import DenseRows, Head
from hfkd.signal import DISTRIBUTION
from hfkd.teachers import LocalTeacher


def make_dataset(rows: list[dict] | None = None, tokenizer: Any = None, **settings: Any) -> DistillationDataset:
    """The views that `training.make_trainer` makes of the same rows."""
    style = settings.pop("style", PromptStyle())
    settings.setdefault("demonstrations", DEMONSTRATIONS)
    return DistillationDataset(rows or ROWS[:16], PromptBuilder(tokenizer or make_tokenizer(), style), **settings)


def speaker(model: Any, prefix: list[int] = ()) -> Any:
    """A function that lets a model speak of a view, as `hfkd cache` does it."""
    teacher = LocalTeacher(model)
    teacher.share_prefix(prefix)

    def speak(view: View) -> DenseRows:
        return teacher.signal(Batch(view), frozenset({DISTRIBUTION})).rows

    return speak


def make_writer(folder: Path, codec: Codec, dataset: Any = None, model: Any = None, **settings: Any) -> CacheWriter:
    """A build of a tiny teacher's cache, four texts a batch."""
    dataset = dataset or make_dataset()
    model = model or make_model(seed=1)
    contract = {"teacher": {"kind": "local", "model": "tiny", "revision": None, "dtype": "float32"}}
    contract |= text_contract(dataset) | {"temperature": settings.pop("temperature", 1.0)}
    contract["teacher"] |= settings.pop("teacher", {})
    settings = {"pad_token_id": 2, "batch_size": 4, **settings}
    return CacheWriter(folder, list(texts_of(dataset)), codec, contract, Head.of(model), **settings)


def build(folder: Path, codec: Codec, dataset: Any = None, model: Any = None, **settings: Any) -> Manifest:
    """A whole cache."""
    dataset, model = dataset or make_dataset(), model or make_model(seed=1)
    writer = make_writer(folder, codec, dataset, model, **settings)
    if writer.open():
        return Manifest.read(folder)
    writer.begin()
    writer.write(speaker(model, dataset.shared_prefix))
    return writer.finish()


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def dense_rows(dataset: Any = None, model: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the teacher says of the first eight examples, [N, V] log-probabilities, and their targets."""
    dataset, model = dataset or make_dataset(), model or make_model(seed=1)
    view = first_view(dataset)
    rows = speaker(model)(view)
    return torch.log_softmax(rows.head.logits(rows.hidden).detach(), dim=-1), view.targets


def first_view(dataset: Any, count: int = 8) -> View:
    """The teacher's view of the first examples, padded on the left, as no build pads."""
    from hfkd.data import DistillationCollator

    inputs = DistillationCollator(2, padding_side="left")([dataset[index] for index in range(count)])
    return Batch.from_inputs(inputs).teacher_view
