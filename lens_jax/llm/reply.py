"""What a server sends back, which may be anything: an answer in it, or what an error means."""

import json
from typing import Any

from lens_jax.llm.request import Answer
from lens_jax.llm.retry import Failure, of_status, one_line

# No call takes more; a server that says so does not know.
_MOST_TOKENS = 1 << 32


def read_reply(reply: Any, seconds: float) -> Answer:
    """The answer in a parsed reply; ValueError where there is none.

    Tokens are -1 where the server does not say how many.
    """
    choices = as_dict(reply).get("choices")
    choice = as_dict(choices[0]) if isinstance(choices, list) and choices else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError("a reply without choices")
    usage = as_dict(reply.get("usage"))
    tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    known = all(type(count) is int and 0 <= count < _MOST_TOKENS for count in tokens)
    text = message.get("content")
    return Answer(
        text=text if isinstance(text, str) else "",
        finish_reason=str(choice.get("finish_reason") or ""),
        refusal=str(message.get("refusal") or ""),
        top_logprobs=_top_logprobs(choice),
        tokens_in=tokens[0] if known else -1,
        tokens_out=tokens[1] if known else -1,
        seconds=seconds,
    )


def read_error(openai, error: Exception, timeout_seconds: float, answered: bool, secret: str) -> Failure:
    """What an error that the SDK raised means; `answered` as in `of_status`. Raised again where it is none of these."""
    line = lambda text: one_line(text, secret)
    if isinstance(error, openai.APIStatusError):
        return of_error_body(error.status_code, error.body, error.message, error.response.headers, answered, secret)
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Failure(f"no answer within {timeout_seconds:g} s", "again", kind="timeout")
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error.__context__ or error
        reason = f"cannot be reached ({line(cause) or type(cause).__name__})"
        return Failure(reason, "again", counts=False, kind="unreachable")
    if isinstance(error, json.JSONDecodeError | openai.APIResponseValidationError):
        return Failure(f"the reply is not JSON ({line(error)})", "again", kind="bad_reply")
    if isinstance(error, openai.OpenAIError | ValueError | TypeError | AttributeError | KeyError):
        reason = f"the reply cannot be read ({type(error).__name__}: {line(error)})"
        return Failure(reason, "again", kind="bad_reply")
    raise error


def of_error_body(status: int, body: Any, otherwise: str, headers, answered: bool, secret: str) -> Failure:
    """What an HTTP error of this status means, by the JSON that came with it, if it did."""
    body = as_dict(body)
    body = body.get("error", body) if isinstance(body.get("error", body), dict) else body
    code = one_line(body.get("code") or body.get("type") or "", secret)
    message = one_line(body.get("message") or otherwise, secret)
    return of_status(status, code, message, headers, answered)


def as_dict(value: Any) -> dict:
    """The value if it is a dict, or an empty one."""
    return value if isinstance(value, dict) else {}


def _top_logprobs(choice: dict) -> tuple[tuple[tuple[str, float], ...], ...]:
    try:
        places = as_dict(choice.get("logprobs")).get("content") or ()
        return tuple(tuple((str(t["token"]), float(t["logprob"])) for t in place["top_logprobs"]) for place in places)
    except (KeyError, TypeError, ValueError):
        return ()
