"""The stages of a run, in their order."""

from lens_jax.data.engine.captions.stage import CaptionStage
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.dedup.keep import Keep
from lens_jax.data.engine.embed import Embed
from lens_jax.data.engine.measure import Measure
from lens_jax.data.engine.probe import Probe
from lens_jax.data.engine.score import Score
from lens_jax.data.engine.select import Select, survivors
from lens_jax.data.engine.stage import Stage
from lens_jax.data.engine.write import Write

# Those that look at one unit alone.
MAPS = ("probe", "measure", "score", "embed")


def make_stages(config: EngineConfig, taken_down: frozenset[bytes] = frozenset()) -> dict[str, Stage]:
    """By name, in the order in which they are run. What the config leaves out is not there."""
    stages: dict[str, Stage] = {"probe": Probe(), "measure": Measure(), "score": Score()}
    if config.models.embedding:
        stages["embed"] = Embed()
    stages["keep"] = Keep(survivors)
    stages["select"] = Select(taken_down)
    if config.caption is not None:
        stages["caption"] = CaptionStage()
    stages["write"] = Write(captioned=config.caption is not None)
    return stages
