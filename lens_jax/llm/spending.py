"""What the calls cost, in all runs that share a cache, and the budget that is kept."""

import dataclasses
import json
import os
import secrets
import time
from pathlib import Path

from lens_jax.atomic import write_json
from lens_jax.errors import LensError
from lens_jax.llm.endpoint import Endpoint

# Seconds between two writings of the account. A process that is killed forgets so much of its spending.
_EVERY = 1.0


@dataclasses.dataclass
class Counts:
    """What happened since the client was made."""

    # Answers from the server, and those that were found in the cache.
    answered: int = 0
    cached: int = 0
    # Tries that failed and were made again, and requests given up.
    retried: int = 0
    failed: int = 0
    # Answers that could not be used, asked again or not.
    unusable: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    # Of the answered calls, and of the slowest one.
    seconds: float = 0.0
    slowest: float = 0.0


class Spending:
    """Counts of this process, and money and tokens of it and all before it.

    Each process writes its own file in the folder `spent` of the cache, so none waits for another. What others spend
    at the same time is read at the start only.
    """

    def __init__(self, endpoint: Endpoint, before: tuple[float, int] = (0.0, 0)):
        """`before` is what else was spent, in US dollars and tokens, and counts."""
        self.counts = Counts()
        self._endpoint = endpoint
        self._before = dict(zip(("usd", "tokens"), before))
        self._most_usd, self._most_tokens, self._written = 0.0, 0, 0.0
        self._file: Path | None = None
        if endpoint.cache:
            folder = Path(endpoint.cache) / "spent"
            self._before = {name: value + self._before[name] for name, value in _sum(folder).items()}
            self._file = folder / f"{os.getpid()}-{secrets.token_hex(4)}.json"

    @property
    def usd(self) -> float:
        return self._before["usd"] + self.counts.usd

    @property
    def tokens(self) -> int:
        return self._before["tokens"] + self.counts.tokens_in + self.counts.tokens_out

    def add(self, tokens_in: int, tokens_out: int, seconds: float) -> None:
        """An answer that was paid for."""
        usd = self._endpoint.usd(tokens_in, tokens_out)
        counts = self.counts
        counts.answered += 1
        counts.tokens_in += tokens_in
        counts.tokens_out += tokens_out
        counts.usd += usd
        counts.seconds += seconds
        counts.slowest = max(counts.slowest, seconds)
        self._most_usd = max(self._most_usd, usd)
        self._most_tokens = max(self._most_tokens, tokens_in + tokens_out)
        if time.monotonic() - self._written > _EVERY:
            self.write()

    def exhausted(self, in_flight: int) -> str:
        """Why one more call beside so many in flight must not be made, or an empty string.

        Each of them is taken to cost as much as the dearest so far.
        """
        endpoint, calls = self._endpoint, in_flight + 1
        usd, tokens = self.usd + calls * self._most_usd, self.tokens + calls * self._most_tokens
        if endpoint.max_usd and max(usd, self.usd + 1e-12) > endpoint.max_usd:
            return f"endpoint.max_usd is {endpoint.max_usd:g}, and {self.usd:.4f} are spent"
        if endpoint.max_tokens and max(tokens, self.tokens + 1) > endpoint.max_tokens:
            return f"endpoint.max_tokens is {endpoint.max_tokens:,}, and {self.tokens:,} are spent"
        return ""

    def mean_tokens(self) -> float:
        """Tokens of an answered call and its question; 0 before the first."""
        counts = self.counts
        return (counts.tokens_in + counts.tokens_out) / max(1, counts.answered)

    def room(self, in_flight: int) -> bool:
        """Whether one more call may join those in flight. What a call costs is learnt from the first, made alone."""
        if not in_flight or not (self._endpoint.max_usd or self._endpoint.max_tokens):
            return True
        return self.counts.answered > 0 and not self.exhausted(in_flight)

    def write(self) -> None:
        """Put down what was spent. Nothing is written where there is no cache, or nothing was asked."""
        self._written = time.monotonic()
        if self._file is None or not self.counts.answered:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LensError(f"{self._file.parent}: cannot be written: {error.strerror}") from None
        counts = self.counts
        write_json(self._file, {"usd": counts.usd, "tokens": counts.tokens_in + counts.tokens_out})


def _sum(folder: Path) -> dict[str, float]:
    total = {"usd": 0.0, "tokens": 0}
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_bytes())
            usd, tokens = float(values["usd"]), int(values["tokens"])
        except (OSError, ValueError, KeyError, TypeError):
            raise LensError(
                f"{path}: damaged; it says what was spent, and the budget needs it (or delete it)"
            ) from None
        total = {"usd": total["usd"] + usd, "tokens": total["tokens"] + tokens}
    return total
