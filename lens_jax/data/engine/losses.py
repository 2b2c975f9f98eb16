"""Stop where a source loses most of its images: at the start of a run, not when it has been paid for."""

from collections.abc import Mapping
from typing import Protocol

from lens_jax.data.engine.outcomes import describe, lost
from lens_jax.errors import LensError

# Images of a source after which its losses are judged while a stage runs; at its end any number is enough.
FIRST = 1000
SHARE = 0.5
# Stages at which nothing should be lost; what others drop is what they are for.
_STRICT = ("probe", "measure", "write")


class _Options(Protocol):
    accept_losses: bool
    strict: bool


def check_losses(stage: str, source: str, counts: Mapping[str, int], options: _Options, at_end: bool) -> None:
    """LensError where more than half of a source's images are lost, or, if `options.strict`, any of them."""
    total, gone = sum(counts.values()), lost(counts)
    if options.strict and gone and stage in _STRICT:
        raise LensError(
            f"source {source}, stage {stage}: {describe(counts)}, and --strict; without it the run goes on, and its "
            "report page shows which"
        )
    if options.accept_losses or not gone or (total < FIRST and not at_end):
        return
    if gone > SHARE * total:
        # What was selected can be looked at before it is written.
        way = "`lens-jax data report` shows which; " if stage == "select" else ""
        raise LensError(
            f"source {source}: stage {stage} lost {gone:,} of {total:,} images ({describe(counts)}); "
            f"{way}pass --accept-losses if that is meant"
        )
