"""A reward behind an HTTP service of one's own: a model that needs another environment, or another machine.

    GET  /health    200 when it is ready
    GET  /rewards   {"rewards": [NAME, ...]}
    POST /score     [{"history": [{"text": PROMPT}, {"image_b64": PNG}], "required_rewards": [NAME], "metadata": {...}}]
                    -> {"results": [{NAME: {PART: 0.7}}, ...], "errors": [{NAME: "why not"}, ...]}

One entry of `results` an image, in their order; a reward that failed for an image is left out there and named in
`errors`, whose entries may be empty. `metadata` has the prompt's id, category, texts and scene.
"""

import base64
import dataclasses
import hashlib
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from lens_jax.errors import LensError, nearest
from lens_jax.llm.cache import DiskCache
from lens_jax.llm.retry import Failure, backoff, of_status, one_line
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.reward import Score

# Bytes of a reply that are read: a group's scores have some kilobytes.
_LONGEST = 16 << 20


@dataclasses.dataclass(frozen=True)
class Service:
    """An HTTP service that scores images (docs/rewards.md has its contract)."""

    # Its address without the path: http://localhost:9000.
    url: str = ""
    # Name of the reward there.
    reward: str = ""
    # Which of the parts that it gives is the reward; empty where it gives one.
    part: str = ""
    # Of the reward, in logs.
    name: str = "service"
    # Images of one call.
    batch: int = 8
    # A call that takes longer is given up, and made again.
    timeout_seconds: float = 120.0
    # Times that a call is made, and the first and longest wait between them.
    tries: int = 5
    wait_seconds: tuple[float, float] = (1.0, 60.0)
    # Folder in which every score is kept, and looked for before the service is asked; "" keeps none. Empty it when the
    # service's model changes.
    cache: str = ""

    def __post_init__(self):
        if min(self.batch, self.tries) < 1 or self.timeout_seconds <= 0 or min(self.wait_seconds) <= 0:
            raise LensError("reward service: batch and tries must be at least 1, times above 0")

    def load(self) -> "ServiceReward":
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise LensError(f"reward service: url is {self.url!r:.80}; expected http://HOST:PORT")
        if not self.reward:
            raise LensError(f"reward service {self.url}: name the reward that it shall give, in `reward`")
        return ServiceReward(self)


class ServiceReward:
    """`<name>` is the part that was chosen, `<name>/<part>` all parts that the service gave."""

    def __init__(self, config: Service):
        self.config = config
        self.name = config.name
        self._url = config.url.rstrip("/")
        self._cache = DiskCache(config.cache) if config.cache else None
        # Not through a proxy of the environment, which would see every image.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def check(self) -> None:
        if self._cache:
            self._cache.check()
        found = self._once("/health", None)
        if isinstance(found, Failure):
            raise LensError(f"reward service {self._url}: {found.reason}")
        listed = self._once("/rewards", None)
        names = listed.get("rewards") if isinstance(listed, Mapping) else listed
        if isinstance(names, list) and names and self.config.reward not in names:
            known = [str(name) for name in names]
            hint = nearest(self.config.reward, known)
            raise LensError(
                f"reward service {self._url}: no reward {self.config.reward!r}{hint}; it has {', '.join(known[:20])}"
            )

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Score]:
        samples = [self._sample(image, prompt) for image, prompt in zip(images, prompts)]
        keys = [hashlib.sha256(json.dumps(["service", 1, sample]).encode()).hexdigest() for sample in samples]
        scores = [self._kept(key) for key in keys]
        wanted = [i for i, score in enumerate(scores) if score is None]
        for start in range(0, len(wanted), self.config.batch):
            chunk = wanted[start : start + self.config.batch]
            for i, entry in zip(chunk, self._ask([samples[i] for i in chunk])):
                scores[i] = self._read(entry)
                if self._cache and scores[i].error is None:
                    self._cache.put(keys[i], entry)
        return scores

    def close(self) -> None:
        """Connections are closed after each call."""

    def _sample(self, image: np.ndarray, prompt: Prompt) -> dict[str, Any]:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(buffer, "png", compress_level=1)
        metadata = {"id": prompt.id, "category": prompt.category, "texts": list(prompt.texts), "scene": prompt.scene}
        return {
            "history": [{"text": prompt.prompt}, {"image_b64": base64.b64encode(buffer.getvalue()).decode("ascii")}],
            "required_rewards": [self.config.reward],
            "metadata": metadata,
        }

    def _kept(self, key: str) -> Score | None:
        values = self._cache.get(key) if self._cache else None
        score = None if values is None else self._read(values)
        return score if score is not None and score.error is None else None

    def _ask(self, samples: list[dict[str, Any]]) -> list[Any]:
        """For each sample the parts of its reward, or a text that says why there are none."""
        body = json.dumps(samples).encode()
        for failures in range(1, self.config.tries + 1):
            reply = self._once("/score", body)
            if not isinstance(reply, Failure):
                return self._entries(reply, len(samples))
            if reply.act != "again":
                raise LensError(f"reward service {self._url}: {reply.reason}")
            if failures < self.config.tries:
                time.sleep(max(reply.retry_after or 0.0, backoff(self.config.wait_seconds, failures)))
        return [f"{reply.reason} (tried {self.config.tries} times)"] * len(samples)

    def _entries(self, reply: Any, count: int) -> list[Any]:
        results = reply.get("results") if isinstance(reply, Mapping) else None
        if not isinstance(results, list) or len(results) != count:
            got = f"{len(results)} results" if isinstance(results, list) else "no results"
            raise LensError(f"reward service {self._url}: {got} for {count} images; see docs/rewards.md")
        errors = reply.get("errors")
        errors = errors if isinstance(errors, list) and len(errors) == count else [{}] * count
        name = self.config.reward
        entries = []
        for result, error in zip(results, errors):
            parts = result.get(name) if isinstance(result, Mapping) else None
            why = error.get(name) if isinstance(error, Mapping) else None
            entries.append(one_line(why or "no value") if parts is None else parts)
        return entries

    def _read(self, parts: Any) -> Score:
        if isinstance(parts, str):
            return Score(error=f"{self.config.reward}: {parts}")
        number = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not isinstance(parts, Mapping) or not parts or not all(number(value) for value in parts.values()):
            return Score(
                error=f"{self.config.reward}: expected finite numbers by name, got {one_line(parts, longest=60)}"
            )
        part = self.config.part or (next(iter(parts)) if len(parts) == 1 else "")
        values = {f"{self.name}/{name}": float(value) for name, value in parts.items()}
        if part not in parts:
            given = ", ".join(map(str, parts))
            raise LensError(f"reward service {self._url}: {self.config.reward} gives {given}; name one in `part`")
        return Score({self.name: float(parts[part]), **values})

    def _once(self, path: str, body: bytes | None) -> Any | Failure:
        """The JSON of one reply, or why there is none."""
        request = urllib.request.Request(self._url + path, body, {"Content-Type": "application/json"})
        try:
            with self._open(request, timeout=self.config.timeout_seconds) as reply:
                data = reply.read(_LONGEST + 1)
        except urllib.error.HTTPError as error:
            with error:
                message = one_line(error.read(2000).decode("utf-8", "replace")) or error.reason
            return of_status(error.code, "", f"{path}: {message}", error.headers, answered=False)
        except TimeoutError:
            return Failure(f"{path}: no answer within {self.config.timeout_seconds:g} s", "again")
        except (OSError, http.client.HTTPException) as error:
            return Failure(f"{path}: cannot be reached ({one_line(getattr(error, 'reason', error))})", "again")
        try:
            if len(data) > _LONGEST:
                raise ValueError(f"longer than {_LONGEST:,} bytes")
            return json.loads(data) if body is not None or data.strip() else {}
        except (ValueError, RecursionError) as error:
            if path == "/health":
                return {}  # that it answers is enough
            return Failure(f"{path}: the reply is not JSON ({one_line(error)})", "again")
