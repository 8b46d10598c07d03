"""When the next request may go out: so many requests and tokens a minute, and not while the endpoint asks to wait.

Knows clocks and numbers; what is asked is known elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

_MINUTE = 60.0


class Pace:
    """Holds requests of several threads back; requests are spread evenly over the minute, never in bursts.

    Args:
        requests_per_minute: None for no limit.
        tokens_per_minute: Of prompts and completions, as the endpoint counted them: a request waits while the last
            minute's are at the limit. Those in flight aren't known yet, so stay a little below what is allowed.
        clock: Seconds that never go back.
        sleep: Waits so many seconds; it may return earlier.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._interval = _MINUTE / requests_per_minute if requests_per_minute else 0.0
        self._tokens_per_minute = tokens_per_minute
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = self._held = float("-inf")
        self._used: deque[tuple[float, int]] = deque()

    def wait(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Return when a request may go out, or when `stopped` says that none will."""
        while not stopped():
            with self._lock:
                now = self._clock()
                start = max(self._next, self._held, self._free_at(now))
                if start <= now:
                    self._next = now + self._interval
                    return
            self._sleep(start - now)

    def hold(self, seconds: float) -> None:
        """Let no request of any thread go out for so long."""
        with self._lock:
            self._held = max(self._held, self._clock() + seconds)

    def spend(self, tokens: int) -> None:
        """Take note of the tokens of a request that came back."""
        if self._tokens_per_minute and tokens:
            with self._lock:
                self._used.append((self._clock(), tokens))

    def _free_at(self, now: float) -> float:
        """When the tokens of the last minute are below the limit."""
        if not self._tokens_per_minute:
            return now
        while self._used and self._used[0][0] <= now - _MINUTE:
            self._used.popleft()
        left = sum(tokens for _, tokens in self._used)
        for moment, tokens in self._used:
            if left < self._tokens_per_minute:
                break
            now, left = moment + _MINUTE, left - tokens
        return now
