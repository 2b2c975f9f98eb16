"""A network in JAX on all devices of this machine, each with its rows of a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lens_jax import parallel
from lens_jax.convert.place import place
from lens_jax.convert.table import Tensors


@dataclass(frozen=True)
class Network:
    """A compiled function with its parameters."""

    # (params, batch [B, ...]) -> arrays [B, ...].
    program: Callable[[dict, jax.Array], Any]
    params: dict
    # None of a single device.
    mesh: Mesh | None

    @classmethod
    def load(cls, function: Callable, leaves: Tensors, template: Mapping[str, Any]) -> "Network":
        """`function`, whose parameters are read from `leaves`, whole on every device that is this machine's."""
        mesh = devices()
        places = None if mesh is None else dict.fromkeys(template, NamedSharding(mesh, PartitionSpec()))
        return cls(jax.jit(function), place(leaves, template, places), mesh)

    def __call__(self, batch: np.ndarray) -> Any:
        """The function of a batch, as numpy arrays in its dtypes. Rows are filled up to a multiple of the devices."""
        rows, filled = len(batch), batch
        if self.mesh is not None and rows % self.mesh.size:
            filled = np.zeros((rows + -rows % self.mesh.size, *batch.shape[1:]), batch.dtype)
            filled[:rows] = batch
        placed = parallel.place_batch({"pixels": filled}, self.mesh)["pixels"]
        found = parallel.on(self.mesh, self.program)(self.params, placed)
        return jax.tree.map(lambda x: np.asarray(x)[:rows], found)


def devices() -> Mesh | None:
    """All devices of this machine along `data`; None where there is one."""
    mine = jax.local_devices()
    return parallel.make_mesh(parallel.MeshConfig(data=-1, fsdp=1), mine) if len(mine) > 1 else None
