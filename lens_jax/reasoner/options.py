"""The reasoner on a command line."""

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from lens_jax.errors import LensError, LensWarning
from lens_jax.reasoner import instructions
from lens_jax.reasoner.rewrite import REASONS, Reasoner, Rewrite


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasonerOptions:
    """Which language model rewrites prompts before they are drawn, if any."""

    # off: prompts are drawn as they are. local: GPT-OSS, the checkpoint's own text encoder, and nothing leaves this
    # machine. api: an OpenAI-compatible server, which gets the prompts.
    reasoner: Literal["off", "local", "api"] = "off"
    # Address of the server that --reasoner api asks, up to and with /v1.
    reasoner_url: str = "https://api.openai.com/v1"
    # Name of the model there.
    reasoner_model: str = "gpt-5.5"
    # Environment variable that holds its key. Empty: OPENAI_API_KEY for api.openai.com, and none for any other server.
    reasoner_key_env: str = ""
    # More fields of every call, as a JSON object: '{"reasoning_effort": "low"}'.
    reasoner_args: str = ""
    # Folder in which answers are kept, and looked for before the server is asked; "" keeps none.
    reasoner_cache: str = ""
    # Go to the server through the proxy that HTTP_PROXY and HTTPS_PROXY name.
    reasoner_proxy: bool = False
    # Stop where the server cannot be asked, instead of drawing the prompt as it is.
    reasoner_strict: bool = False
    # Where the model refuses a prompt: draw it as it is, or stop.
    reasoner_refusal: Literal["draw", "block"] = "draw"
    # A text file with other instructions for the model than ours.
    reasoner_instructions: str = ""

    def check_reasoner(self) -> None:
        """LensError for what cannot be asked; before a model is loaded, which takes minutes.

        Of a server that is not there only a warning, unless --reasoner-strict is set: it may come, or be in the cache.
        """
        if self.reasoner == "api":
            from lens_jax.llm.retry import Unreachable

            with contextlib.closing(self._by_api(None)) as reasoner:
                try:
                    reasoner.check()
                except Unreachable as error:
                    if self.reasoner_strict:
                        raise
                    warnings.warn(f"{error}; what it does not rewrite is drawn as it is", LensWarning, stacklevel=2)
        elif self.reasoner == "local":
            instructions.read(self.reasoner_instructions)

    def make_reasoner(self, encoder: Any = None, name: str = "gpt-oss") -> Reasoner | None:
        """The reasoner; None for "off".

        encoder: the text encoder of the model, if it is loaded: "local" writes with it, "api" counts tokens with it.
        LensError where it cannot write.
        """
        if self.reasoner == "off":
            return None
        if self.reasoner == "api":
            return self._by_api(encoder)
        from lens_jax.reasoner.local import LocalReasoner

        return LocalReasoner(encoder, instructions.read(self.reasoner_instructions), name=name)

    def _by_api(self, encoder: Any):
        from lens_jax.reasoner.api import ApiReasoner, default_endpoint

        endpoint = default_endpoint(
            self.reasoner_url,
            self.reasoner_model,
            key_env=self.reasoner_key_env,
            arguments=self.reasoner_args,
            cache=self.reasoner_cache,
            proxy=self.reasoner_proxy,
        )
        text, counted = instructions.read(self.reasoner_instructions), {}
        if tokenizer := getattr(encoder, "tokenizer", None):
            counted = {"count": lambda text: len(tokenizer.encode(text)), "most_tokens": encoder.prompt_tokens}
        return ApiReasoner(endpoint, text, strict=self.reasoner_strict, **counted)

    def check_refusals(self, rewrites: Sequence[Rewrite]) -> None:
        """LensError for the first that the model refused, where that is to stop everything."""
        refused = next((rewrite for rewrite in rewrites if rewrite.reason == "refused"), None)
        if refused and self.reasoner_refusal == "block":
            why = refused.detail or REASONS["refused"]
            raise LensError(f"{refused.prompt[:60]!r}: {why} (--reasoner-refusal block)")


def told(rewrite: Rewrite) -> str:
    """One line for people: what became of a prompt."""
    if rewrite.status != "raw":
        return {"used": "rewritten", "kept": "kept as it is"}[rewrite.status]
    detail = f" ({rewrite.detail})" if rewrite.detail else ""
    return f"drawn as it is: {REASONS[rewrite.reason]}{detail}"
