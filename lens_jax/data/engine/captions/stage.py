"""The stage `caption`: what its tables depend on. Its units are run as one stream, by `command.run`."""

from collections.abc import Mapping

from lens_jax.data.engine.captions import contract
from lens_jax.data.engine.captions.batch import Batched
from lens_jax.data.engine.captions.config import Caption
from lens_jax.data.engine.captions.journal import Journal, folder_of
from lens_jax.data.engine.captions.online import Online
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.decode import Limits
from lens_jax.errors import LensError


class CaptionStage:
    """The stage. A model need not answer alike twice, but each answer is kept: the table follows from those."""

    name, version, reads = "caption", 1, ("probe", "select")
    by_item = False

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        caption = config.caption
        if caption is None:
            return {}
        named = lambda endpoint: None if endpoint is None else [endpoint.model, endpoint.extra()]
        return {
            "prompt": contract.PROMPT_VERSION,
            "models": [named(caption.endpoint), named(caption.second)],
            "kinds": [caption.kinds, caption.brief_of],
            "sources": {source.name: source.caption for source in config.sources},
            "image": [caption.short_side, caption.quality],
            "answer": [caption.temperature, caption.max_tokens, caption.asks, caption.most_alike],
        }


def open_asker(config: EngineConfig, threads: int) -> tuple[Journal, Online | Batched]:
    """The journal of a run, and who asks: LensError where that is nobody."""
    if config.caption is None:
        raise LensError(
            "the config has no `caption`: name an endpoint and a model in it, or keep the sources' captions"
        )
    caption: Caption = config.caption
    limits = Limits(config.max_pixels, config.max_bytes, config.strict_jpeg)
    journal = Journal(folder_of(config.work))
    online = Online(caption, journal, limits, threads)
    return journal, Batched(caption, online, limits) if caption.mode == "batch" else online
