"""What a TPU spends on attention by the size of its blocks, as the TPU's own compiler schedules it; needs no TPU.

python -m lens_jax.bench.splash v5e 128 512 1024 1280

The compiler's cost analysis takes a Pallas kernel for a call that costs nothing, whatever its blocks. Its schedule says
more: a grid step is one straight piece of code, and its length in instructions (VLIW bundles, one a cycle) over the
scores of a block is what a score costs, transfers that hide behind it excepted. Prints that for a thousand scores,
forward and backward, for the released head size; needs the extra: tpu.
"""

import functools
import os
import re
import sys
import tempfile
from pathlib import Path

from lens_jax.errors import LensError

_KERNEL = re.compile(r"splash_mha_(fwd|dkv)_segmented.*schedule-analysis_final_bundles")


def instructions(hardware: str, side: int, dumps: Path) -> dict[str, float]:
    """Of a thousand scores, by kernel ("fwd", "dkv"), in blocks of `side` x `side`; `dumps` is where libtpu writes."""
    import jax
    import jax.numpy as jnp

    from lens_jax.models import attention_tpu
    from lens_jax.parallel import MeshConfig
    from lens_jax.planning import topology

    device = topology.slice_mesh(MeshConfig(), hardware, 4).devices.flat[0]
    place = jax.sharding.SingleDeviceSharding(device)
    # Two blocks each way: what is done in the first and the last of a row is in the code too.
    x = jax.ShapeDtypeStruct((1, 2 * side, 2, 64), jnp.bfloat16, sharding=place)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=place)
    splash = functools.partial(attention_tpu.splash, name="attention", side=side)
    gradient = jax.grad(lambda q, k, v, n: jnp.sum(splash(q, k, v, n).astype(jnp.float32)), (0, 1, 2))
    jax.jit(gradient).trace(x, x, x, lengths).lower(lowering_platforms=("tpu",)).compile()
    found = {}
    for path in dumps.iterdir():
        if kernel := _KERNEL.search(path.name):
            bundles = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
            found[kernel[1]] = 1000 * int(bundles[1]) / side**2
        path.unlink()
    return found


def main() -> None:
    if len(sys.argv) < 3:
        raise LensError("usage: python -m lens_jax.bench.splash v5e|v5p|v6e SIDE ...")
    with tempfile.TemporaryDirectory() as folder:
        # Read once, when libtpu is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        for side in map(int, sys.argv[2:]):
            found = instructions(sys.argv[1], side, Path(folder))
            print(f"{sys.argv[1]} {side:5}: forward {found['fwd']:5.2f}, backward {found['dkv']:5.2f}", flush=True)


if __name__ == "__main__":
    main()
