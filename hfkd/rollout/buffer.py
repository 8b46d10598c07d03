"""Texts that the student wrote before, to be learned again in place of new ones.

The idea is DistiLLM's (arXiv 2402.03898): generation costs more than a step of training, and a text that is a few
steps old is still nearly the student's own. Each process keeps the texts it generated itself.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfkd.rollout.texts import Text


class OffPolicyBuffer:
    """The last texts that the student wrote, on this process.

    Whether a step reuses is a function of seed and step, from the second written step on: all processes and a resumed
    run decide alike.

    Args:
        size: Rows that are kept; the oldest leave first.
        reuse: Share of the student's steps that are taken from here, from 0 to below 1.

    Attributes:
        steps: Steps whose texts came in, the same number on every process.

    Raises:
        ValueError: The size is below 1, or the share isn't one.
    """

    def __init__(self, size: int, reuse: float) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"buffer_size is {size!r}; expected a number of rows, at least those of one step.")
        if isinstance(reuse, bool) or not 0 <= reuse < 1:
            raise ValueError(
                f"reuse is {reuse!r}; expected the share of steps that reuse old texts, from 0 to below 1 (at 1 the "
                "student would never write again)."
            )
        self.size, self.reuse, self.steps = size, float(reuse), 0
        self._texts: deque[Text] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, texts: Sequence[Text]) -> None:
        """Keep the texts of a step, except those without an answer.

        Raises:
            ValueError: A step has more rows than the buffer.
        """
        if len(texts) > self.size:
            raise ValueError(
                f"buffer_size is {self.size}, but a step has {len(texts)} rows on this process. Set it to a few "
                "times as many, or to 0 for no buffer."
            )
        self.steps += 1
        self._texts.extend(text for text in texts if text.answer)

    def reuses(self, seed: int, step: int) -> bool:
        """Whether a step takes old texts."""
        return self.steps > 0 and random.Random(f"{seed}/{step}/reuse").random() < self.reuse

    def draw(self, rows: int, seed: int, step: int) -> list[Text]:
        """Draw rows for a step, all different while there are enough.

        Returns:
            As many as asked for; none where nothing is kept.
        """
        draw, kept = random.Random(f"{seed}/{step}/rows"), list(self._texts)
        if len(kept) >= rows:
            return draw.sample(kept, rows)
        return draw.choices(kept, k=rows) if kept else []

    def state_dict(self) -> dict[str, Tensor]:
        """The rows as padded int32 ids [n, T] with their lengths [n], the routes [n] and the number of steps.

        A length or a route of -1 stands for none.
        """
        texts = list(self._texts)
        state = {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "route": torch.tensor([-1 if text.route is None else text.route for text in texts], dtype=torch.int64),
        }
        for name in ("student", "teacher", "answer"):
            sequences = [getattr(text, name) for text in texts]
            lengths = [-1 if each is None else len(each) for each in sequences]
            width = max([0, *lengths])
            padded = [[*(each or ()), *[0] * (width - len(each or ()))] for each in sequences]
            state[name] = torch.tensor(padded, dtype=torch.int32).reshape(len(texts), width)
            state[f"{name}_length"] = torch.tensor(lengths, dtype=torch.int32)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the rows back; of more than there is room for, the newest.

        Raises:
            KeyError: A part is missing.
        """
        columns = [_sequences(state[name], state[f"{name}_length"]) for name in ("student", "teacher", "answer")]
        routes = [None if route < 0 else route for route in state["route"].tolist()]
        self._texts = deque((Text(*row) for row in zip(*columns, routes, strict=True)), maxlen=self.size)
        self.steps = int(state["steps"])


def _sequences(ids: Tensor, lengths: Tensor) -> list[list[int] | None]:
    pairs = zip(ids.tolist(), lengths.tolist(), strict=True)
    return [None if length < 0 else row[:length] for row, length in pairs]
