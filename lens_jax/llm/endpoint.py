"""Which server is asked, and how hard."""

import dataclasses
import json
import math
import os
from typing import Any, Literal
from urllib.parse import urlsplit

from lens_jax.errors import LensError


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server (OpenAI, vLLM, SGLang, llama.cpp, Ollama) and how it is asked."""

    # Its address up to and with /v1: https://api.openai.com/v1, http://localhost:8000/v1. Nothing is sent where it is
    # empty.
    url: str = ""
    # Name of the model there.
    model: str = ""
    # Environment variable that holds the key. Empty: OPENAI_API_KEY for api.openai.com, and no key for any other
    # server, so that nobody is sent the key of another.
    key_env: str = ""
    # Calls in flight at once, of each process. Halved by the server's "too many requests", and then raised again.
    concurrency: int = 64
    # Calls begun a minute, of each process; 0 sets no limit.
    requests_per_minute: float = 0.0
    # Tokens a minute, of questions and answers, of each process; 0 sets no limit.
    tokens_per_minute: float = 0.0
    # A call that takes longer is given up, and made again.
    timeout_seconds: float = 120.0
    # Times that one call is made, if it fails by a time-out, an error of the server or a reply that is not JSON.
    tries: int = 5
    # A failed call waits so long before the next try, doubled each time up to the second number, and times 0.5 to 1 by
    # chance. A server's own Retry-After is waited for in full.
    wait_seconds: tuple[float, float] = (1.0, 60.0)
    # Stop when the server has answered nobody for so long: it is down, or refuses everything.
    give_up_seconds: float = 600.0
    # Folder in which every answer is kept, and looked for before the server is asked; "" keeps none. Several processes
    # may share it. One small file an answer.
    cache: str = ""
    # Price of a million tokens, of input and output, in US dollars. Prices change, so none are built in.
    usd_per_million: tuple[float, float] = (0.0, 0.0)
    # Stop before more than this is spent, in all runs with this cache; 0 sets no limit.
    max_usd: float = 0.0
    # The same in tokens, input and output together.
    max_tokens: int = 0
    # What the length of an answer is limited by. Servers that refuse the first are asked by the second.
    length_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    # More fields of every call, as a JSON object: '{"reasoning_effort": "low"}'.
    arguments: str = ""
    # Go through the proxy that HTTP_PROXY and HTTPS_PROXY name.
    proxy: bool = False

    def __post_init__(self):
        if "@" in self.url.partition("://")[2].partition("/")[0]:  # before any file of a run can hold it
            raise LensError("endpoint.url must not hold a password; name its environment variable in endpoint.key_env")
        least = {
            "concurrency": 1, "tries": 1, "timeout_seconds": 0.001, "give_up_seconds": 0.001, "requests_per_minute": 0,
            "tokens_per_minute": 0, "max_usd": 0, "max_tokens": 0,
        }  # fmt: skip
        for name, number in least.items():
            if not number <= getattr(self, name) < math.inf:
                raise LensError(f"endpoint.{name} is {getattr(self, name)}; it must be at least {number}")
        if min(self.wait_seconds) <= 0 or self.wait_seconds[0] > self.wait_seconds[1]:
            raise LensError(f"endpoint.wait_seconds is {self.wait_seconds}; expected two rising numbers above 0")
        if not all(0 <= price < math.inf for price in self.usd_per_million):
            raise LensError(f"endpoint.usd_per_million is {self.usd_per_million}; prices must not be below 0")
        if self.max_usd and not any(self.usd_per_million):
            raise LensError("endpoint.max_usd needs endpoint.usd_per_million, the price of tokens in and out")
        self.extra()

    def extra(self) -> dict[str, Any]:
        """`arguments` as plain values."""
        try:
            values = json.loads(self.arguments or "{}")
        except ValueError as error:
            raise LensError(f"endpoint.arguments is not JSON ({error}); expected an object") from None
        if not isinstance(values, dict):
            raise LensError(f"endpoint.arguments is {self.arguments!r:.60}; expected a JSON object")
        return values

    def usd(self, tokens_in: float, tokens_out: float) -> float:
        """Price of so many tokens in US dollars."""
        price_in, price_out = self.usd_per_million
        return (tokens_in * price_in + tokens_out * price_out) / 1e6

    def require(self, what: str) -> None:
        """LensError where `what`, which needs the endpoint, has no address or model to ask."""
        if not self.url or not self.model:
            missing = "url" if not self.url else "model"
            raise LensError(f"{what} needs endpoint.{missing}; for example url http://localhost:8000/v1 and model NAME")
        try:
            parts = urlsplit(self.url)
            whole = (
                parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            )
            whole = whole and self.url.isascii() and self.url.isprintable() and " " not in self.url
        except ValueError:  # a port that is no number, half an IPv6 address
            whole = False
        if not whole:
            raise LensError(f"endpoint.url is {self.url!r:.80}; expected http://HOST:PORT/v1 or https://HOST/v1")
        if self.hosted_by_openai and parts.scheme == "http":
            raise LensError(
                f"endpoint.url is {self.url!r:.80}; api.openai.com is asked by https, or all could read the key"
            )

    @property
    def hosted_by_openai(self) -> bool:
        """Whether it is OpenAI itself, which may be sent OpenAI's key."""
        return urlsplit(self.url).hostname == "api.openai.com"

    def key(self) -> str:
        """The key to send, or an empty string. LensError where the variable that was named is not set."""
        name = self.key_env or ("OPENAI_API_KEY" if self.hosted_by_openai else "")
        if not name:
            return ""
        key = os.environ.get(name, "").strip()
        if not key:
            raise LensError(f"{self.url}: the environment variable {name} is not set; it must hold the key")
        if not key.isascii() or not key.isprintable():
            raise LensError(f"{self.url}: the environment variable {name} holds characters that no key has")
        return key
