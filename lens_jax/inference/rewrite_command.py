"""`lens-jax rewrite`: prompts as a language model would have them drawn."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from lens_jax.atomic import check_writable, write_text
from lens_jax.console import make_console
from lens_jax.errors import LensError
from lens_jax.inference.load import text_encoder
from lens_jax.reasoner.options import ReasonerOptions, told
from lens_jax.reasoner.rewrite import Rewrite


@dataclasses.dataclass(frozen=True)
class RewriteCommand(ReasonerOptions):
    """Print each prompt as it would be drawn with `lens-jax sample --reasoner`, one a line, and why on stderr."""

    # What to rewrite.
    prompts: tyro.conf.Positional[tuple[str, ...]]
    # local: GPT-OSS of --checkpoint, and nothing leaves this machine. api: an OpenAI-compatible server.
    reasoner: Literal["local", "api"] = dataclasses.field(default="local", kw_only=True)
    # Of local: a release folder, its conversion, or the weights of its text encoder.
    checkpoint: str = ""
    # Where its tokenizer is, if not there.
    tokenizer: str = ""
    # What local draws its words by, 0 to 2^64 - 1: the same seed gives the same rewrite.
    seed: int = 0
    # The day the conversation claims to be, YYYY-MM-DD.
    date: str | None = None
    # What local computes in; by default bfloat16 on accelerators, float32 on a CPU.
    dtype: Literal["float32", "bfloat16"] | None = None
    # Also write all that is known of each rewrite here, a JSON object a line.
    json: str = ""

    def __post_init__(self):
        if not self.prompts:
            raise LensError('give at least one prompt: lens-jax rewrite "red apple" --reasoner api')


def rewrite(args: RewriteCommand) -> list[Rewrite]:
    """Rewrite, print, and write where asked to; returns what became of each prompt."""
    if args.json:
        if Path(args.json).is_dir():
            raise LensError(f"--json {args.json}: is a folder; a file is needed")
        check_writable(Path(args.json).parent)
    args.check_reasoner()
    console = make_console(stderr=True)
    encoder = None
    if args.reasoner == "local":
        if not args.checkpoint:
            raise LensError("--reasoner local needs --checkpoint, a release whose GPT-OSS writes; or --reasoner api")
        encoder = text_encoder(
            args.checkpoint, dtype=args.dtype, tokenizer=args.tokenizer or None, date=args.date, head=True
        )
    reasoner = args.make_reasoner(encoder, args.checkpoint)
    try:
        with console.status("rewriting"):
            found = reasoner.rewrite(args.prompts, args.seed)
    finally:
        reasoner.close()
    # First of all, since it may have been paid for.
    if args.json:
        lines = [json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in found]
        write_text(args.json, "".join(lines))
    args.check_refusals(found)
    tell(console, found)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal's encoding has not all of Unicode
    for one in found:
        # A line a prompt, whatever the model did.
        print(" ".join(one.text.split()))
    return found


def tell(console: Console, rewrites: list[Rewrite], texts: bool = False) -> None:
    """A line on each prompt, with its rewrite where the `texts` are wanted."""
    for one in rewrites:
        shown = " ".join(one.prompt.split())
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        text = f": {' '.join(one.text.split())}" if texts and one.status == "used" else ""
        console.print(f"{shown!r}: {told(one)}{text}")
