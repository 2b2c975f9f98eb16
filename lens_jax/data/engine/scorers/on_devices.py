"""A network on all devices of this process: weights whole on each, the rows of a batch divided among them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lens_jax import parallel
from lens_jax.convert.place import place
from lens_jax.convert.table import Tensors
from lens_jax.parallel import MeshConfig


class OnDevices:
    """`function(params, batch [B, ...]) -> [B, ...]`, compiled once for every B; its parameters are read from `leaves`
    by the paths of `template`."""

    def __init__(self, function: Callable[[dict, jax.Array], jax.Array], leaves: Tensors, template: Mapping[str, Any]):
        devices = jax.local_devices()
        self._mesh = parallel.make_mesh(MeshConfig(data=-1, fsdp=1), devices) if len(devices) > 1 else None
        self._parts = len(devices)
        whole = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        self._params = place(leaves, template, whole and dict.fromkeys(template, whole))
        self._function = jax.jit(function)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """What the function gives for a batch of any size, on the host."""
        short = -len(batch) % self._parts
        filled = np.pad(batch, [(0, short)] + [(0, 0)] * (batch.ndim - 1)) if short else batch
        rows = parallel.place_batch({"images": filled}, self._mesh)["images"]
        return np.asarray(parallel.on(self._mesh, self._function)(self._params, rows))[: len(batch)]
