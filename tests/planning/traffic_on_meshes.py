"""Run by a test in a process of its own: eight simulated devices have to be asked for before JAX starts.

python traffic_on_meshes.py MESH ...   prints, for each mesh "data,fsdp,tensor,sequence", the bytes of all collectives
of one kind as one JSON line: as planned from the trace, and as found in the compiled text.
"""

import collections
import functools
import json
import math
import os
import re
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from lens_jax import parallel  # noqa: E402
from lens_jax.models.denoiser import DenoiserConfig  # noqa: E402
from lens_jax.parallel import MeshConfig  # noqa: E402
from lens_jax.planning import communication, program  # noqa: E402
from lens_jax.pretraining.config import TrainConfig  # noqa: E402
from lens_jax.pretraining.recipe import RULES, create_state, make_programs  # noqa: E402

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
# Three blocks, so that a loop is counted as often as it runs; recomputed, so that weights are gathered twice.
MODEL = DenoiserConfig(
    layers=3, heads=8, head_dim=16, rope_axes=(4, 6, 6), latent_channels=16, text_width=24, text_layers=2,
    mlp_width=336, dtype="float32", remat="full",
)  # fmt: skip


def traced(mesh):
    """A training step on eight rows of 4 x 4 latent tokens and eight of text, its shapes alone."""
    config, number = TrainConfig(model=MODEL, steps=100), jax.ShapeDtypeStruct((16,), "float32")
    create = functools.partial(create_state, config)
    state = parallel.abstract(create, RULES, mesh, {"mean": number, "scale": number})
    array = functools.partial(parallel.abstract_array, mesh=mesh)
    batch = {
        "latents": array("latents", (8, 16, 16), "float32"),
        "text": (array("text", (8, 8, 24), "float32"),) * 2,
        "text_lengths": array("text_lengths", (8,), "int32"),
        "positions": array("positions", (24, 3), "int32"),
    }
    with jax.set_mesh(mesh):
        return make_programs(config).train_step.trace(state, batch)


def planned(trace) -> dict[str, int]:
    """Bytes by kind, as often as each collective runs."""
    found = collections.Counter()
    for one in communication.collectives(program.read(trace.jaxpr)):
        found[one.kind] += one.times * one.bytes
    return {kind: found[kind] for kind in KINDS}


def compiled(text: str) -> dict[str, int]:
    """The same from the text of the compiled program: every loop's body as often as XLA knows it to run."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = start[2]
            entry = name if start[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def count(name: str) -> collections.Counter:
        total = collections.Counter()
        for line in bodies[name]:
            if loop := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                times = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1])
                total += collections.Counter({kind: times * size for kind, size in count(loop[1]).items()})
            elif call := re.search(r" (?:call|fusion)\(.*(?:to_apply|calls)=%?([\w.\-]+)", line):
                total += count(call[1])
            elif found := re.search(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line):
                devices = group(line)
                size = sum(math.prod(map(int, filter(None, dims.split(",")))) * BYTES[kind]
                           for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[1]))  # fmt: skip
                if devices > 1:
                    total[found[2]] += size * (devices if found[2] == "reduce-scatter" else 1)
        return total

    found = count(entry)
    return {kind: found[kind] for kind in KINDS}


def group(line: str) -> int:
    """How many devices take part in a collective, in any of XLA's three notations."""
    if explicit := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(explicit[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    sizes, axes = re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line).groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))


def main() -> None:
    for name in sys.argv[1:]:
        mesh = parallel.make_mesh(MeshConfig(*map(int, name.split(","))))
        trace = traced(mesh)
        with jax.set_mesh(mesh):
            text = trace.lower().compile().as_text()
        print(json.dumps({"mesh": name, "planned": planned(trace), "compiled": compiled(text)}), flush=True)


if __name__ == "__main__":
    main()
