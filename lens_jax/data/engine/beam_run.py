"""A stage on units by Apache Beam: its runner spreads them, and the tables are those that our workers make."""

import functools
from collections.abc import Sequence

from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.run_unit import Runner
from lens_jax.data.engine.stage import Stage
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError


def run_by_beam(
    stage: Stage, config: EngineConfig, layout: Layout, units: Sequence[Unit], workers: int, arguments: Sequence[str]
) -> None:
    """Run `stage` on those of `units` that have no table, in a pipeline of a runner that `arguments` name.

    All workers must see the work folder. What a runner does twice, or leaves and does again, changes nothing; LensError
    where it ends and a unit has no table.
    """
    from lens_jax.data.engine.dedup.beam import RunUnits, beam, runner_options

    finished = layout.finished(stage.name)
    missing = [unit for unit in units if unit.id not in finished]
    if not missing:
        return
    with beam.Pipeline(options=runner_options(workers, arguments)) as pipeline:
        _ = (
            pipeline
            | "Units" >> beam.Create(missing)
            | "Stage" >> RunUnits(functools.partial(Runner, stage, config, layout))
        )
    gone = {unit.id for unit in missing} - layout.finished(stage.name)
    if gone:
        raise LensError(
            f"stage {stage.name}: Beam's runner ended, and {len(gone):,} units have no table, {min(gone)} among them; "
            "run it again"
        )
