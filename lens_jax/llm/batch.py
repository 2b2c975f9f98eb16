"""The batch API: files of questions that a server answers within a day, at OpenAI for half the price.

A batch is known by a name of ours in its metadata. So one that was created by a process that died of it, or by a call
whose reply was lost, is found again and not made twice.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lens_jax.errors import LensError
from lens_jax.llm.client import Client
from lens_jax.llm.reply import as_dict, of_error_body, read_reply
from lens_jax.llm.request import Answer, Request
from lens_jax.llm.retry import Failure, one_line

# What a file may hold.
MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000
_WINDOW, _NAME = "24h", "lens_jax"
_ENDED = ("completed", "failed", "expired", "cancelled")
# Seconds that the transfer of a file may take.
_TRANSFER = 900.0
# A batch is not looked for among those that are older.
_OLDEST = 3 * 24 * 3600.0
# The server has enough to do: the batch was not begun, and is to be sent later.
CROWDED = ("token_limit_exceeded", "enqueued_token_limit_exceeded", "batch_queue_limit_exceeded")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One at the server."""

    id: str
    # "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled".
    status: str
    # Ids of files there; empty where there is none.
    input_file: str = ""
    output_file: str = ""
    error_file: str = ""
    # Why it failed: codes, and the first one's words.
    codes: tuple[str, ...] = ()
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in _ENDED

    @property
    def crowded(self) -> bool:
        """Whether it was turned away for what others there are."""
        return self.status == "failed" and any(code in CROWDED for code in self.codes)


class Batches:
    """The batches of one client's endpoint."""

    def __init__(self, client: Client):
        self._client = client
        self._endpoint = client.endpoint

    def line(self, key: str, request: Request) -> bytes:
        """A question as a line of a file; `key` names its answer."""
        endpoint = self._endpoint
        body = request.body(endpoint.model, endpoint.extra(), endpoint.length_field)
        values = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(values, separators=(",", ":")).encode() + b"\n"

    def upload(self, name: str, lines: Sequence[bytes]) -> str:
        """The id of a file with these lines."""
        data = b"".join(lines)

        async def attempt(sdk):
            return await sdk.files.create(file=(f"{name}.jsonl", data), purpose="batch")

        return _id(self._client.call(attempt, _TRANSFER), "an uploaded file")

    def create(self, name: str, file: str, again: bool = False) -> Batch:
        """A batch of an uploaded file. With `again` it may be there already, and then is found."""
        tried = again

        async def attempt(sdk):
            nonlocal tried
            if tried and (found := await self._find(sdk, name)) is not None:
                return found
            tried = True
            body = {
                "input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": _WINDOW,
                "metadata": {_NAME: name},
            }  # fmt: skip
            return await sdk.post("/batches", cast_to=object, body=body)

        return self._batch(self._client.call(attempt))

    def find(self, name: str) -> Batch | None:
        """The batch of this name, if it was created in the last days."""
        values = self._client.call(lambda sdk: self._find(sdk, name))
        return None if values is None else self._batch(values)

    def look(self, id: str) -> Batch:
        """How far it is."""
        return self._batch(self._client.call(lambda sdk: sdk.get(f"/batches/{id}", cast_to=object)))

    def results(self, batch: Batch) -> Iterator[tuple[str, Answer | Failure]]:
        """(key, answer or what went wrong) of what an ended batch gave; questions it says nothing of are missing.

        Answers are not counted yet: see `Client.paid`.
        """
        for file in (batch.output_file, batch.error_file):
            for line in self._content(file).split(b"\n") if file else ():
                if found := self._result(line):
                    yield found

    def remove(self, batch: Batch) -> None:
        """Delete its files, which hold images: the answers are kept here."""
        for file in filter(None, (batch.input_file, batch.output_file, batch.error_file)):
            self.remove_file(file)

    def remove_file(self, file: str) -> None:
        """Delete a file; one that is gone already is no fault."""

        async def attempt(sdk):
            try:
                return await sdk.delete(f"/files/{file}", cast_to=object)
            except Exception as error:
                if getattr(error, "status_code", None) == 404:
                    return None
                raise

        self._client.call(attempt)

    def _content(self, file: str) -> bytes:
        async def attempt(sdk):
            return (await sdk.files.content(file)).content

        return self._client.call(attempt, _TRANSFER)

    async def _find(self, sdk, name: str) -> Any | None:
        after, oldest = "", time.time() - _OLDEST
        while True:
            query = f"?limit=100{f'&after={after}' if after else ''}"
            page = as_dict(await sdk.get(f"/batches{query}", cast_to=object))
            batches = page.get("data") if isinstance(page.get("data"), list) else []
            for values in map(as_dict, batches):
                if as_dict(values.get("metadata")).get(_NAME) == name:
                    return values
            ids = [str(as_dict(values).get("id") or "") for values in batches]
            made = [as_dict(values).get("created_at") for values in batches]
            new = [when for when in made if isinstance(when, int | float) and when >= oldest]
            if not page.get("has_more") or not ids or not ids[-1] or ids[-1] == after or not new:
                return None
            after = ids[-1]

    def _batch(self, values: Any) -> Batch:
        values = as_dict(values)
        listed = as_dict(values.get("errors")).get("data")
        errors = [as_dict(error) for error in listed] if isinstance(listed, list) else []
        text = lambda name: values[name] if isinstance(values.get(name), str) else ""
        return Batch(
            _id(values, "a batch"),
            text("status"),
            text("input_file_id"),
            text("output_file_id"),
            text("error_file_id"),
            tuple(str(error.get("code") or "") for error in errors),
            one_line(errors[0].get("message") or "", self._client.key) if errors else "",
        )

    def _result(self, line: bytes) -> tuple[str, Answer | Failure] | None:
        """What a line of a file says; None for one that says nothing."""
        try:
            values = as_dict(json.loads(line))
        except (ValueError, RecursionError):
            return None
        key, response = values.get("custom_id"), as_dict(values.get("response"))
        if not isinstance(key, str):
            return None
        status = response.get("status_code")
        if status == 200:
            try:
                return key, read_reply(response.get("body"), 0.0)
            except (ValueError, TypeError, AttributeError, KeyError):
                return key, Failure("the reply cannot be read", "again")
        if isinstance(status, int):
            return key, of_error_body(status, response.get("body"), "no reason given", {}, True, self._client.key)
        error = as_dict(values.get("error"))
        return key, Failure(
            one_line(error.get("message") or error.get("code") or "no answer", self._client.key), "again"
        )


def _id(values: Any, what: str) -> str:
    found = values.get("id") if isinstance(values, dict) else getattr(values, "id", None)
    if not isinstance(found, str) or not found:
        raise LensError(f"the batch API gave {what} without an id; does this server have one?")
    return found
