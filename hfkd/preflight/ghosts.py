"""Models without numbers: what runs on them takes no memory, and it is counted what it would have taken.

A ghost is a tensor that knows its shape, type and device and has no numbers (torch's `FakeTensor`). Inside `Ghosts`
whatever is made of ghosts is a ghost, and so is every floating-point tensor that is made of nothing; ids, masks and
places stay real, since what is read depends on them. So a whole step, checkpointing, adapters and attention kernels
included, is run by the code that will train, and each of its tensors is counted from its birth to its end.

What kernels take for themselves while they run, and what allocators keep back, isn't seen.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FEW = 64
"""A floating-point tensor that is made of no ghost and has no more numbers stays real: somebody may look at them."""


class Ledger:
    """Bytes of the tensors that are alive, by what they are for, and what they were when they were most.

    Args:
        shares: How much of a part this process holds: 1 / n of what lies in shards. 1 where nothing is said.

    Attributes:
        part: What a tensor that is made now is for.
        live: Bytes by part.
        peak: Bytes by part at the moment when all of them together were most.
        most: The most bytes of each part at any moment.
    """

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        self.shares = dict(shares or {})
        self.part = "other"
        self.live: Counter[str] = Counter()
        self._parts: dict[int, str] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the peak; what is alive now is the first one."""
        self.peak, self.most = dict(self.live), Counter(self.live)
        self._highest = self.total

    @property
    def total(self) -> float:
        """Bytes of all that is alive."""
        return sum(self.live.values())

    def take(self, tensor: Tensor, part: str | None = None) -> None:
        """Count a tensor's memory, once; one that is known moves to the part, where one is named.

        Args:
            tensor: Any; what shares its memory is counted with it.
            part: What it is for; None takes `self.part`, for memory that isn't known yet.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._parts:
            self._parts[key] = part or self.part
            weakref.finalize(storage, self._drop, key, size)
            self._add(self._parts[key], size)
        elif part is not None and part != self._parts[key]:
            self._add(self._parts[key], -size)
            self._parts[key] = part
            self._add(part, size)

    @contextmanager
    def entry(self, part: str) -> Iterator[None]:
        """What is made inside is for this."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def _drop(self, key: int, size: int) -> None:
        self._add(self._parts.pop(key), -size)

    def _add(self, part: str, size: int) -> None:
        self.live[part] += size * self.shares.get(part, 1.0)
        self.most[part] = max(self.most[part], self.live[part])
        if size > 0 and (total := self.total) > self._highest:
            self._highest, self.peak = total, dict(self.live)


class Ghosts(TorchDispatchMode):
    """A context in which tensors have no numbers, and are counted.

    Args:
        ledger: Where they are counted.
        real: Whether they have numbers all the same, and are only counted.
    """

    def __init__(self, ledger: Ledger, real: bool = False) -> None:
        super().__init__()
        self.ledger, self.real = ledger, real
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def of(self, model: nn.Module, device: torch.device, part: str) -> nn.Module:
        """A model's ghost: the same modules, hooks and shared weights, and no numbers. The model itself where numbers
        are real.

        Args:
            model: On any device, the meta device too; it stays as it is.
            device: Where the ghost would lie.
            part: What its weights are for.
        """
        made = model if self.real else self._without_numbers(model, device)
        for tensor in [*made.parameters(), *made.buffers()]:
            self.ledger.take(tensor, part)
        return made

    def _without_numbers(self, model: nn.Module, device: torch.device) -> nn.Module:
        memo: dict[int, Any] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            if id(tensor) not in memo:
                memo[id(tensor)] = self._ghost(tensor, device)
        made = copy.deepcopy(model, memo)
        made.to = lambda *_, **__: made  # it is where it would lie, and torch can't move what has no numbers
        return made

    def _ghost(self, tensor: Tensor, device: torch.device) -> Tensor:
        if not tensor.is_floating_point() and not isinstance(tensor, nn.Parameter) and tensor.device.type != "meta":
            return tensor.to(device, copy=True)
        with self._fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation on ghosts without numbers and any other one as it is, and count what it made."""
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if any(isinstance(one, FakeTensor) for one in tensors):
            args = _with_places(func, args)
            with self._fake:
                made = func(*args, **kwargs)
        elif self.real or (made := self._from_nothing(func, tensors, args, kwargs)) is None:
            made = func(*args, **kwargs)
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self.ledger.take(one)
        return made

    def _from_nothing(self, func: Any, tensors: Iterable[Tensor], args: tuple, kwargs: dict) -> Any:
        """A ghost where an operation on no ghost gives many floating-point numbers; else None."""
        name = func.overloadpacket.__name__
        if any(one.is_floating_point() for one in tensors) and "_like" not in name and not name.startswith("new_"):
            return None  # real numbers that somebody brought
        if name.endswith("_") or name in ("detach", "alias", "_local_scalar_dense", "lift_fresh"):
            return None
        try:
            with self._fake:
                made = func(*args, **kwargs)
        except RuntimeError:  # its shape depends on numbers, which are there
            return None
        fits = isinstance(made, Tensor) and made.is_floating_point() and made.numel() > _FEW
        return made if fits else None


def _with_places(func: Any, args: tuple) -> tuple:
    """Real masks in an index become the places that they mark: how many there are isn't known of a ghost."""
    if func.overloadpacket.__name__ not in ("index", "index_put", "index_put_", "_unsafe_index"):
        return args
    places: list[Tensor | None] = []
    for one in args[1]:
        real = isinstance(one, Tensor) and not isinstance(one, FakeTensor)
        places += one.nonzero().unbind(1) if real and one.dtype in (torch.bool, torch.uint8) else [one]
    return (args[0], places, *args[2:])
