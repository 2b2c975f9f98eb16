"""How every run begins, whatever it trains: the devices, their mesh, the log, the checkpoints, the signals."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from lens_jax import parallel
from lens_jax.errors import LensError
from lens_jax.pretraining import determinism
from lens_jax.run import loop, store
from lens_jax.run.job import Job
from lens_jax.run.log import Log
from lens_jax.run.signals import StopSignals


def start(config: Any, make_job: Callable[[Any, Mesh | None, Log], Job], console: Console | None) -> loop.Outcome:
    """Train until `config.steps`, from where the run folder `config.out` stands.

    make_job: (config as it is settled, mesh, log) -> the job.
    """
    if jax.config.jax_enable_x64:
        raise LensError("jax_enable_x64 is on, which changes what is drawn at random and so a run; turn it off")
    config = determinism.settle(config)
    # One device needs no mesh, and is the faster for it: nothing has to say where it lives. It must be what was asked
    # for all the same: JAX falls back to the CPU where it finds no GPU that it can use.
    config.mesh.sizes(jax.device_count())
    mesh = parallel.make_mesh(config.mesh) if jax.device_count() > 1 else None
    log = Log(config.out, config.steps, config.logging, config.profile, console)
    log.say(f"training on {parallel.described(jax.devices())}")
    checkpoints = store.Store(store.folder_of(config.out, config.checkpoint), config.checkpoint, mesh)
    with StopSignals(mesh) as signals:
        return loop.run(make_job(config, mesh, log), checkpoints, log, signals)
