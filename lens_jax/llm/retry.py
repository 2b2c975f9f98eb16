"""What a failed call means: wait and make it again, give this one up, or stop altogether."""

import dataclasses
import email.utils
import math
import random
import time
from collections.abc import Mapping
from typing import Literal

from lens_jax.errors import LensError

# Statuses that say "later": request time-out, conflict, too early, too many requests. Every 5xx does too.
_LATER = (408, 409, 425, 429)
# Of these the server, not the question, is the cause: they say nothing about the call, and do not use up its tries.
_NOT_THIS_CALL = (429, 502, 503, 504)
# Statuses of what no question survives: key, money, address or model, method.
_HOPELESS = (401, 402, 404, 405)
# Codes of a 429 that waiting does not heal.
_NEVER = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")

# What servers call an error that means "not this question", whatever its status.
REFUSED = ("content_filter", "content_policy_violation", "moderation_blocked", "invalid_prompt")

# How a call failed where no HTTP status says it: no answer in time, no connection, a reply that cannot be read.
Kind = Literal["", "timeout", "unreachable", "bad_reply"]


class Unreachable(LensError):
    """The server answered nobody for too long, or asks to wait longer than that: it may well answer later."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a call failed, and what to do."""

    reason: str
    # "again", "skip" (this request's own fault), "stop" (every request's).
    act: str
    # Whether it uses up one of the call's tries.
    counts: bool = True
    # Seconds that the server asks to wait, for all calls.
    retry_after: float | None = None
    # Of the HTTP reply; 0 where there was none.
    status: int = 0
    # What the server calls it, such as "content_filter".
    code: str = ""
    # Where there is no status.
    kind: Kind = ""

    @property
    def crowded(self) -> bool:
        """Too many requests: fewer at once from now on."""
        return self.status == 429


def of_status(status: int, code: str, message: str, headers: Mapping[str, str], answered: bool) -> Failure:
    """What an HTTP error means. `answered` says whether this server has answered any call yet.

    A key that is refused, money that is gone and a wrong address or model, or one that redirects, stop everything. So
    does 403 as long as nothing was answered, but for a refusal; later it may be about one question alone.
    """
    reason = f"HTTP {status}{f' ({code})' if code else ''}: {message}"
    barred = status == 403 and not answered and code not in REFUSED
    if status in _HOPELESS or 300 <= status < 400 or code in _NEVER or barred:
        return Failure(reason, "stop", status=status, code=code)
    if status in _LATER or status >= 500:
        return Failure(reason, "again", status not in _NOT_THIS_CALL, retry_after(headers), status, code)
    return Failure(reason, "skip", status=status, code=code)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by `retry-after-ms` or `Retry-After`, which is a number or a date; None where neither is said."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def backoff(wait_seconds: tuple[float, float], failures: int) -> float:
    """Seconds before the next try, after so many failures: doubled each time, times 0.5 to 1 by chance, so that calls
    that failed together do not come back together."""
    first, longest = wait_seconds
    return min(longest, first * 2.0 ** min(failures - 1, 60)) * random.uniform(0.5, 1.0)


def one_line(text: object, secret: str = "", longest: int = 300) -> str:
    """A server's words for a message of ours: in one line, printable, not endless, and without the key."""
    line = " ".join(str(text).split())
    if secret:
        line = line.replace(secret, "[key]")
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
