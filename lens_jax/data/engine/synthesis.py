"""Images of text as one more source of a run: the stage `synthesize` draws them, and from there they are like any."""

import dataclasses
from pathlib import Path

from lens_jax.data.engine import units
from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.layout import Layout
from lens_jax.data.engine.run_stage import run_stage
from lens_jax.data.engine.stage import fingerprints
from lens_jax.data.engine.supervisor import Options
from lens_jax.data.engine.synthetic import stage as synthetic

# Beside the tables of units and of groups.
UNITS = "synthetic"


def with_synthetic(config: EngineConfig) -> EngineConfig:
    """The config with a source of the images that are drawn; itself where none are."""
    if not config.synthetic.count or any(source.name == synthetic.SOURCE for source in config.sources):
        return config
    return dataclasses.replace(
        config, sources=(*config.sources, synthetic.source(_layout(config).folder("synthesize")))
    )


def synthesize(config: EngineConfig, options: Options, show: bool = True) -> bool:
    """Draw this machine's share of the images; whether all of them are there then."""
    layout, of = _layout(config), synthetic.units(config)
    units.save_units(Path(config.work) / f"{UNITS}.parquet", [(unit, "") for unit in of])
    # A last unit that was not full, of a smaller count, would be read as well.
    for gone in layout.finished("synthesize") - {unit.id for unit in of}:
        layout.table("synthesize", gone).unlink(missing_ok=True)
    run_stage(synthetic.Synthesize(), with_synthetic(config), layout, of, options, show)
    return len(layout.finished("synthesize")) == len(of)


def with_layout(config: EngineConfig, layout: Layout) -> Layout:
    """The layout of a run with that of the stage `synthesize`."""
    return Layout(layout.work, {**_layout(config).fingerprints, **layout.fingerprints})


def _layout(config: EngineConfig) -> Layout:
    return Layout(Path(config.work), fingerprints({"synthesize": synthetic.Synthesize()}, config))
