"""What the log says between two steps: each term per token, tokens per second, the teacher's share of the time, the
agreement.

Sums are kept on the device and read once per log line; nothing here decides anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import PartialState

from hfkd.distributed import total_over_processes
from hfkd.objective import LossSum


class Meter:
    """Sums over the tokens since the last log line.

    Args:
        device: Where the sums are kept.

    Attributes:
        gradients: The norm of each term's gradient on this process, when it was last measured; read once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gradients: dict[str, float] = {}
        self._sums: dict[str, tuple[torch.Tensor | float, float]] = {}
        self._teacher_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started = time.perf_counter()

    def add(self, result: LossSum) -> None:
        """Count one micro-batch.

        Args:
            result: What the objective said of it.
        """
        tokens = float(result.tokens)
        self.add_ratio("tokens", tokens, 1.0)
        for name, part in result.parts.items():
            self.add_ratio(f"loss/{name}", part.detach().float(), tokens)
        for name, value in result.measures.items():
            self.add_ratio(name, value.detach().float(), tokens)
        if result.agreed is not None:
            self.add_ratio("teacher/agreement", result.agreed.float(), tokens)

    def add_ratio(self, name: str, part: torch.Tensor | float, whole: float) -> None:
        """Count something that the log shows as the sum of its parts over the sum of its wholes.

        Args:
            name: Of the log entry.
            part: A scalar.
            whole: What it is a part of.
        """
        known = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = known[0] + part, known[1] + whole

    @contextmanager
    def teaching(self, counted: bool = True) -> Iterator[None]:
        """Time what runs inside as the teacher's share; on CUDA with events, so that nothing has to wait.

        Args:
            counted: Whether it belongs to the training, and not to an evaluation.
        """
        if not counted:
            yield
            return
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            return
        began = time.perf_counter()
        yield
        self._teacher_seconds += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time that is spent inside out of the training's speed."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - began

    def flush(self) -> dict[str, float]:
        """Read and reset.

        Returns:
            `loss/<term>` (per token that it was counted on, before its weight; nats, unless the loss says otherwise),
            `speed/tokens_per_second` and `speed/teacher_share` (of the wall time of this process),
            `teacher/agreement` (a fraction), `gradient/<term>` where it was measured, and whatever losses noted, per
            token, or whatever else was added. Sums are taken over all processes, which must all call this.
        """
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        sums = self._reduced()  # also where this process has counted nothing: the others wait for it
        if not sums:
            return {}
        tokens = max(sums.pop("tokens", (0.0, 1.0))[0], 1.0)
        logs = {name: part / whole for name, (part, whole) in sums.items() if whole > 0}
        logs["speed/tokens_per_second"] = tokens / elapsed
        logs["speed/teacher_share"] = min(1.0, self._teacher_time() / elapsed)
        logs |= {f"gradient/{name}": norm for name, norm in self.gradients.items()}
        self._sums, self._teacher_seconds, self._started, self.gradients = {}, 0.0, time.perf_counter(), {}
        return logs

    def _reduced(self) -> dict[str, tuple[float, float]]:
        names = _names_everywhere(self._sums)
        if not names:
            return {}
        pairs = [number for name in names for number in self._sums.get(name, (0.0, 0.0))]
        values = torch.stack(
            [torch.as_tensor(one, dtype=torch.float32, device=self.device).reshape(()) for one in pairs]
        )
        if PartialState().num_processes > 1:
            torch.distributed.all_reduce(values)
        numbers = iter(values.tolist())
        return dict(zip(names, zip(numbers, numbers, strict=True), strict=True))

    def _teacher_time(self) -> float:
        if self._events:
            torch.cuda.synchronize(self.device)
            self._teacher_seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events = []
        return self._teacher_seconds


def per_token(sums: Sequence[LossSum], device: torch.device, agreement: bool) -> dict[str, float]:
    """Turn the sums of an evaluation into means over all its tokens, on all processes.

    Args:
        sums: One per batch of this process.
        device: Where collectives run.
        agreement: Whether the rows that agree were counted.

    Returns:
        `loss`, `loss/<term>` (per token) and `teacher/agreement` (a fraction); empty where no token was seen.
    """
    tokens = float(total_over_processes(sum(one.tokens for one in sums), device))
    if not tokens:
        return {}

    def mean(values: Iterator[torch.Tensor]) -> float:
        return float(total_over_processes(sum(float(value) for value in values), device)) / tokens

    means = {"loss": mean(one.total for one in sums)}
    for name in sums[0].parts if sums else ():
        means[f"loss/{name}"] = mean(one.parts[name] for one in sums)
    for name in _names_everywhere({name: None for one in sums for name in one.measures}):
        means[name] = mean(one.measures.get(name, 0.0) for one in sums)
    if agreement and all(one.agreed is not None for one in sums):
        means["teacher/agreement"] = mean(one.agreed for one in sums)
    return means


def _names_everywhere(known: Mapping[str, object]) -> list[str]:
    """The names that any process knows, in one order: a process without a token has nothing noted."""
    if PartialState().num_processes == 1:
        return sorted(known)
    gathered: list[list[str] | None] = [None] * PartialState().num_processes
    torch.distributed.all_gather_object(gathered, sorted(known))
    return sorted({name for names in gathered for name in names or ()})
