"""Parts of a prompt set, for the report's two ablations: a quarter and a half of it, and a category left out.

The report trains on 1/4, 1/2 and all of its 8,406 prompts (GenEval 0.916, 0.920, 0.930), and without those that ask for
text (CVTG 0.832 against 0.869).
"""

from collections.abc import Sequence

from lens_jax.errors import LensError, nearest
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.prompts.taxonomy import order_of


def subset(
    prompts: Sequence[Prompt], fraction: float = 1.0, without: Sequence[str] = (), seed: int = 0
) -> list[Prompt]:
    """The prompts of a part, in their order.

    Of each category the same fraction (rounded). Which prompts these are follows from the seed and their ids, so a
    smaller part lies within a larger one, and does not depend on what else is in the set. LensError for an unknown
    category or a part without prompts.
    """
    if not 0 < fraction <= 1:
        raise LensError(f"fraction is {fraction}; it must be above 0 and at most 1")
    known = list(dict.fromkeys(prompt.category for prompt in prompts))
    for category in without:
        if category not in known:
            raise LensError(f"no category {category!r}{nearest(category, known)}; the set has {', '.join(known)}")
    kept: set[str] = set()
    for category in known:
        if category not in without:
            ids = sorted((p.id for p in prompts if p.category == category), key=lambda id: order_of(seed, id))
            kept.update(ids[: round(fraction * len(ids))])
    if not kept:
        raise LensError(f"no prompts left of {len(prompts)} with fraction {fraction:g} and without {list(without)}")
    return [prompt for prompt in prompts if prompt.id in kept]
