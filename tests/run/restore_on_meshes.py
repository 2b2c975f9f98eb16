"""Run by tests in a process of its own: eight simulated devices have to be asked for before JAX starts.

python restore_on_meshes.py RUN   restores the newest checkpoint on several meshes and prints digests of all bits.
"""

import dataclasses
import functools
import hashlib
import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
from flax.traverse_util import unflatten_dict  # noqa: E402

from lens_jax import config as config_files  # noqa: E402
from lens_jax import parallel  # noqa: E402
from lens_jax.parallel import MeshConfig  # noqa: E402
from lens_jax.pretraining import warm_start  # noqa: E402
from lens_jax.pretraining.config import TrainConfig  # noqa: E402
from lens_jax.run import store as checkpoint  # noqa: E402
from lens_jax.run.optimizer import make_optimizer  # noqa: E402
from lens_jax.run.state import create_state  # noqa: E402


def main(run: str) -> None:
    config = config_files.from_dict(TrainConfig, checkpoint.read_metadata(checkpoint.find(run))["config"], run)
    optimizer = make_optimizer(config.optimizer, config.steps)
    create = functools.partial(create_state, config.model, optimizer, seed=1)
    digests = {}
    for sizes in ((1, 1, 1, 1), (1, 8, 1, 1), (1, 2, 1, 1), (8, 1, 1, 1), (1, 4, 2, 1), (2, 2, 2, 1)):
        count = int(np.prod(sizes))
        mesh = parallel.make_mesh(MeshConfig(*sizes), jax.devices()[:count]) if count > 1 else None
        abstract = parallel.abstract(create, mesh, checkpoint.abstract_codec(config))
        state, _ = checkpoint.restore_newest(checkpoint.folder_of(config), abstract, mesh)
        params, _ = warm_start.load(dataclasses.replace(config, init_from=run, init_part="params"), mesh)
        for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(unflatten_dict(params, sep="/"))):
            assert one.sharding == other.sharding
        assert mesh is None or any(not x.is_fully_replicated for x in jax.tree.leaves(state.params)) or sizes[0] == 8
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves([state, unflatten_dict(params, sep="/")]):
            is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            digest.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
        digests[",".join(map(str, sizes))] = digest.hexdigest()
    print(json.dumps(digests))


if __name__ == "__main__":
    main(sys.argv[1])
