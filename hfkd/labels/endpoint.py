"""One request to an address that speaks OpenAI's chat protocol, and what can be wrong with its reply.

Asks once and says what happened; asking again, waiting and counting are known elsewhere. The key is read from the
environment, held by the client alone, and taken out of every message.
"""

from __future__ import annotations

import email.utils
import ipaddress
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from hfkd.labels.plan import EndpointSection, GenerationSection
from hfkd.masking import MASK, mask_secrets

_LOST_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")


class EndpointError(ValueError):
    """The endpoint can't be used as it is asked; the message says what to change. What was answered is kept."""


@dataclass(frozen=True)
class Reply:
    """A text, and what it cost.

    Attributes:
        text: Never empty.
        prompt_tokens: As the endpoint counts them; None where it doesn't say.
        completion_tokens: The same.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Fault(Exception):
    """An attempt that gave no text.

    Args:
        kind: `timeout`, `connection`, `rate_limit`, `server`, `malformed`, `empty`, `cut`, or `refused`.
        words: What happened.
        retry_after: Seconds that the endpoint asks to wait.
        again: Whether asking again may help.
        usage: `(prompt_tokens, completion_tokens)` where it was paid for.
    """

    def __init__(
        self,
        kind: str,
        words: str,
        *,
        retry_after: float | None = None,
        again: bool = True,
        usage: tuple[int | None, int | None] = (0, 0),
    ) -> None:
        super().__init__(f"{kind}: {words}")
        self.kind = kind
        self.retry_after = retry_after
        self.again = again
        self.usage = usage


class Endpoint:
    """A model behind a URL.

    Args:
        settings: Where it is and how long a request may take.

    Raises:
        EndpointError: The key isn't in the environment, or the package `openai` isn't installed.
    """

    def __init__(self, settings: EndpointSection) -> None:
        self.settings = settings
        self._key = find_key(settings)
        try:
            from openai import OpenAI
        except ImportError as error:
            raise EndpointError(
                f"A teacher behind an address needs the package openai ({error}); install it with: pip install "
                "'hfkd[label]'"
            ) from error
        self._client = OpenAI(
            base_url=settings.url, api_key=self._key or "none", timeout=settings.timeout, max_retries=0
        )
        if not (urlsplit(settings.url).hostname or "").endswith("openai.com"):
            self._client.organization = self._client.project = None  # of the environment, and nobody else's business

    def ask(self, messages: Sequence[Mapping[str, Any]], generation: GenerationSection) -> Reply:
        """Ask once.

        Args:
            messages: A conversation that ends with the user.
            generation: How the text is written. What is None isn't sent; not every endpoint heeds a seed.

        Raises:
            Fault: There is no text, or only part of one.
            EndpointError: Asking on makes no sense: no such model, a wrong key, no credit left.
        """
        import openai

        limit = {} if "max_completion_tokens" in generation.extra else {"max_tokens": generation.max_tokens}
        options = {"top_p": generation.top_p, "seed": generation.seed, "stop": generation.stop or None}
        try:
            reply = self._client.chat.completions.create(
                model=self.settings.model,
                messages=list(messages),
                temperature=generation.temperature,
                extra_body={**limit, **generation.extra},
                **{name: value for name, value in options.items() if value is not None},
            )
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            raise self._fault(error) from None
        return self._read(reply, generation.max_tokens)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _read(self, reply: Any, max_tokens: int) -> Reply:
        """The text of a reply to a request that allowed so many tokens.

        The client checks no types: whatever the endpoint sent stands where it put it.
        """
        usage = tuple(_count(getattr(reply, "usage", None), name) for name in ("prompt_tokens", "completion_tokens"))
        try:
            choice = reply.choices[0]
            text, reason = choice.message.content, choice.finish_reason
        except (AttributeError, IndexError, TypeError, KeyError):
            raise Fault("malformed", f"the reply is no chat completion: {self._words(reply)}", usage=usage) from None
        if text is not None and not isinstance(text, str):
            raise Fault("malformed", f"the content is {self._words(text)}; expected a text", usage=usage)
        if reason == "length":
            raise Fault("cut", f"it didn't end within {max_tokens} tokens", usage=usage)
        if reason == "content_filter":
            raise Fault("refused", "the endpoint's content filter held it back", again=False, usage=usage)
        if not text or not text.strip():
            raise Fault("empty", f"there is no text in the reply (finish_reason {reason!r})", usage=usage)
        return Reply(text, *usage)

    def _fault(self, error: Exception) -> Exception:
        """What an error of the client means."""
        import openai

        words = self._words(error)
        if isinstance(error, openai.APITimeoutError):
            words = f"no reply within {self.settings.timeout:g} seconds"
            return Fault("timeout", words, usage=(None, None))
        if isinstance(error, openai.APIConnectionError):
            return Fault("connection", f"{words} {self._words(error.__cause__ or '')}".strip())
        if not isinstance(error, openai.APIStatusError):
            return Fault("malformed", words, usage=(None, None))
        status, words = error.status_code, self._words(error.response.text or error)
        if status in (401, 403, 404) or getattr(error, "code", None) in _LOST_CREDIT:
            return EndpointError(f"{self.settings.url} answers {status}: {words}. {self._way_out(status)}")
        if status == 429 or status >= 500 or status in (408, 409, 425):
            kind = "rate_limit" if status == 429 else "timeout" if status == 408 else "server"
            return Fault(kind, f"{status}: {words}", retry_after=retry_after(error.response.headers))
        return Fault("refused", f"{status}: {words}", again=False)

    def _way_out(self, status: int) -> str:
        name = self.settings.api_key_env
        if status in (401, 403):
            return f"The key is read from the environment variable {name}" if name else "Name it: endpoint.api_key_env"
        if status == 404:
            return f"Check endpoint.url (it usually ends in /v1) and endpoint.model ({self.settings.model})"
        return "Nothing more is asked; run the same command again when there is credit"

    def _words(self, what: Any) -> str:
        """A short text of anything, without the key and what looks like another one."""
        text = " ".join(str(what).split())
        if self._key:
            text = text.replace(self._key, MASK)
        text = mask_secrets(text)
        return text if len(text) <= 300 else text[:297] + "..."


def find_key(settings: EndpointSection) -> str | None:
    """The key from the environment; None where none is needed, or none is set and the address is this machine.

    Raises:
        EndpointError: The variable isn't set.
    """
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if key:
        return key
    if is_this_machine(settings.url):
        return None
    raise EndpointError(
        f"The environment variable {settings.api_key_env} is not set, and {settings.url} is another machine; set it "
        "to your key, name another variable with endpoint.api_key_env, or endpoint.api_key_env: null for none."
    )


def is_this_machine(url: str) -> bool:
    """Whether a URL leads to the machine that asks."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a `Retry-After` header asks to wait, from a number or a date; None where it says nothing."""
    exact, text = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if exact is not None:
            return max(0.0, float(exact) / 1000)
        return None if text is None else max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text or "").timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _count(usage: Any, name: str) -> int | None:
    """Tokens of a reply, where it says so in a way that can be summed."""
    value = getattr(usage, name, None)
    return value if type(value) is int and value >= 0 else None
