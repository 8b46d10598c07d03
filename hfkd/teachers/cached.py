"""A teacher that spoke once: its distributions are read from a cache, and it is no longer in memory.

Rows are found by the hash of a text's tokens, so order, batches, padding and processes may be others than when the
cache was built. What the run expects of the cache is compared with the manifest before the first step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from hfkd.batch import Batch
from hfkd.cache.codecs import make_codec
from hfkd.cache.contract import text_contract, text_keys
from hfkd.cache.format import CacheError, Manifest, compare, view_keys
from hfkd.cache.reader import CacheReader, find_faults
from hfkd.data.views import DistillationDataset
from hfkd.signal import TeacherSignal
from hfkd.teachers.base import Teacher

logger = logging.getLogger(__name__)

_REMEDY = "Build a cache for this run with `hfkd cache`, or bring the run back to what the cache was made of."


class CachedTeacher(Teacher):
    """What a teacher said when a cache was built.

    Args:
        path: The folder of the cache.
        expected: What the run expects, as a contract (see `hfkd.cache.format`); fields that it doesn't have are not
            compared. `expect` sets it later.
        verify: Whether to hash all shards before training; each process takes a share.
        subset: Whether the training set may be a part of the cached texts, in any order. If not, it must be all of
            them in the order of the build.

    Raises:
        CacheError: There is no cache, or its manifest is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        expected: Mapping[str, Any] | None = None,
        verify: bool = True,
        subset: bool = False,
    ) -> None:
        self.path, self.expected, self.verify, self.subset = Path(path), expected, verify, subset
        self.manifest = Manifest.read(self.path)
        self.reader: CacheReader | None = None

    def expect(self, contract: Mapping[str, Any]) -> None:
        """Hear what the run expects, and compare it at once.

        Args:
            contract: See `expected`.

        Raises:
            CacheError: The cache is another one; names each field.
        """
        self.expected = dict(contract)
        if self.manifest.contract["codec"]["kind"] == "hidden":
            self.expected.pop("temperature", None)  # hidden states serve any
        compare(self.manifest.contract, self.expected, self.path, _REMEDY)

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Compare the contract, check the shards and open them.

        Raises:
            CacheError: The cache is another one, unfinished or damaged; names the field or the file, on all processes.
        """
        self.expect(self.expected or {})
        if self.reader is not None:
            return
        if self.verify and self.manifest.status == "complete":
            self._check_files()
        self.reader = CacheReader(self.path, self.manifest, accelerator.device, self.verify)
        logger.info("The cache %s holds %d texts.", self.path, len(self.reader))

    def meet(self, dataset: DistillationDataset, training: bool = True) -> None:
        """Make sure, before the first step, that the cache was made of these texts.

        Raises:
            CacheError: Tokenizer, template, prompt or data are others, or a text isn't there.
        """
        reader = self._opened()
        keys = text_keys(dataset)
        ours = text_contract(dataset, keys)
        data = ours.pop("data")
        compare(self.manifest.contract, ours, self.path, _REMEDY)
        if absent := reader.missing(keys):
            named = f"{'training' if training else 'evaluation'} example {absent[0]}"
            raise CacheError(
                f"data: {len(absent)} of {len(keys)} texts aren't in the cache {self.path}, the first is {named}. "
                f"{_REMEDY}"
            )
        theirs = self.manifest.contract.get("data")  # none where the teacher wrote the answers
        if training and not self.subset and theirs is not None and data != theirs:
            what = "the same texts in another order" if data["rows"] == theirs["rows"] else "a part of its texts"
            raise CacheError(
                f"data.sha256: the cache in {self.path} was made of {theirs['rows']} rows ({theirs['sha256'][:12]}), "
                f"this run has {data['rows']} ({data['sha256'][:12]}): {what}, or some of them repeated. Bring the "
                "data back, or say that a part in any order is meant: CachedTeacher(..., subset=True)."
            )

    @property
    def vocab_size(self) -> int:
        """The number of ids that the cached teacher scored."""
        return self.manifest.contract["vocab_size"]

    @property
    def drawn(self) -> bool:
        """Whether its codec keeps drawn ids only."""
        return make_codec(**self.manifest.contract["codec"]).drawn

    def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
        """Read the rows of the texts of a batch.

        Raises:
            CacheError: A text isn't in the cache.
        """
        view = batch.teacher_view
        keys, tokens = view_keys(view)
        keys = [key for key, count in zip(keys, tokens, strict=True) if count]  # the others have no rows to look up
        tokens = [count for count in tokens if count]
        with torch.no_grad():
            return TeacherSignal(self._opened().rows(keys, tokens, view.input_ids.device))

    def weights(self) -> AbstractContextManager[PreTrainedModel]:
        """There are none.

        Raises:
            CacheError: Always; it is called where a text is to be written that the cache doesn't hold.
        """
        raise CacheError(
            f"A cached teacher has no model that could write an answer, and the cache {self.path} doesn't hold all "
            "that are asked for. Build it with the same recipe, number of steps and number of processes, or use "
            "`answer: dataset`."
        )

    def describe(self) -> dict[str, Any]:
        """The name of the cache, its hash, and what it was made of."""
        contract = self.manifest.contract
        kept = {name: contract[name] for name in ("teacher", "temperature", "codec") if name in contract}
        facts = {"bytes_per_token": self.manifest.facts.get("bytes_per_token")}
        return {"kind": "cached", "cache": self.path.name, "sha256": self.manifest.digest, **kept, **facts}

    def _opened(self) -> CacheReader:
        if self.reader is None:
            raise RuntimeError("The cache isn't open yet: call `prepare` first (the trainer does).")
        return self.reader

    def _check_files(self) -> None:
        """Hash the shards, each process a share of them; all hear of each fault."""
        state = PartialState()
        faults = find_faults(self.path, self.manifest, (state.process_index, state.num_processes))
        if state.num_processes > 1:
            faults = gather_object(faults)
        if faults:
            raise CacheError(
                f"The cache in {self.path} is damaged: {'; '.join(faults)}. Copy it anew from where it was made, or "
                "build it anew with --overwrite."
            )
