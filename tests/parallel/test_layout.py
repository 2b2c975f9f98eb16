"""Every host of every slice finds the rows that its devices hold, however the network orders them."""

import dataclasses

import numpy as np
import pytest

from lens_jax import parallel
from lens_jax.errors import LensError, LensWarning
from lens_jax.parallel import AXES, MeshConfig, rows
from lens_jax.planning import topology

# tests/planning/test_topology.py compares these descriptions with libtpu's.
SLICES = [
    ("v6e", 16), ("v6e", 256), ("v5e", 16), ("v5e", 64), ("v5e", 256), ("v5p", 16), ("v5p", 64), ("v5p", 128),
]  # fmt: skip
MESHES = {
    "data": MeshConfig(data=-1, fsdp=1),
    "fsdp": MeshConfig(),
    "data, fsdp 4": MeshConfig(data=-1, fsdp=4),
    "data 2": MeshConfig(data=2),
    "tensor 4": MeshConfig(tensor=4),
    "data 2, tensor 2": MeshConfig(data=2, tensor=2),
    "data, tensor 2, sequence 2": MeshConfig(data=-1, fsdp=1, tensor=2, sequence=2),
    "sequence 4": MeshConfig(sequence=4),
}


def check_rows(mesh, images: int) -> None:
    """Hosts hold all rows, each as many as its devices hold parts, and give every device what the layout says."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    hosts = sorted({device.process_index for device in mesh.devices.flat})
    batch = {
        "text_lengths": np.arange(images, dtype=np.int32),
        "latents": np.arange(images * 8, dtype=np.int32).reshape(images, 8, 1),
        "positions": np.arange(24, dtype=np.int32).reshape(8, 3),
        "n_image": np.int32(7),
    }
    read = []
    for host in hosts:
        mine = parallel.rows_of_host(mesh, images, host)
        assert mine.dtype == np.int64
        # Where the mesh has this host's devices, without asking JAX.
        places = {place[:2] for place, device in np.ndenumerate(mesh.devices) if device.process_index == host}
        assert len(mine) == len(places) * images // parts
        assert parallel.global_rows(mesh, len(mine), host) == images
        for name, whole in batch.items():
            has = whole if name in ("positions", "n_image") else whole[mine]
            shape, layout, block = rows.blocks(name, np.asarray(has), mesh, host)
            assert shape == whole.shape
            for device, index in layout.devices_indices_map(shape).items():
                if device.process_index == host:
                    np.testing.assert_array_equal(block(index), whole[index])
        read.append(mine)
    assert np.array_equal(np.unique(np.concatenate(read)), np.arange(images))
    if mesh.size == parts:
        assert sum(map(len, read)) == images


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize(("hardware", "chips"), SLICES)
def test_every_host_of_a_slice(hardware, chips, slices):
    devices = topology.describe(hardware, slices * chips, slices)
    meshes = {**MESHES, "data, fsdp 64": MeshConfig(data=-1, fsdp=64)} if chips >= 64 else MESHES
    for config in meshes.values():
        mesh = parallel.make_mesh(config, devices)
        check_rows(mesh, 2 * mesh.shape["data"] * mesh.shape["fsdp"])
        if slices > 1 and mesh.shape["data"] % slices == 0:
            # Only `data` crosses between them: what is at one place of it is in one slice.
            assert all(len({device.slice_index for device in part.flat}) == 1 for part in mesh.devices)


def test_the_pods_that_did_not_start():
    """The network's order is kept, so the rows of a host are no block; and the split that JAX refuses to choose."""
    mesh = parallel.make_mesh(MeshConfig(), topology.describe("v6e", 16))
    assert parallel.rows_of_host(mesh, 16, 0).tolist() == [0, 1, 6, 15]
    layout = parallel.arrange((4, 64, 1, 1), topology.describe("v6e", 256))
    assert (layout.how, layout.plain) == ("along parts of the 16x16 torus", False)


@pytest.mark.parametrize("name", MESHES)
def test_slices_are_joined_along_rows(name):
    # The last first.
    devices = topology.describe("v6e", 32, 2)[::-1]
    mesh = parallel.make_mesh(MESHES[name], devices)
    # Each axis that is within a slice has it from end to end.
    inner = {device.slice_index for device in mesh.devices[0, 0].flat}
    assert len(inner) == 1
    how = parallel.arrange(MESHES[name].sizes(32), devices).how
    across = "data 2" if mesh.shape["data"] > 1 else "fsdp 2"
    assert how.startswith(f"2 slices along {across}, each along ")


def test_what_cannot_be_joined():
    with pytest.raises(LensError, match=r"tensor 32 x sequence 1 must divide the 16 chips of .* mesh\.tensor 16 would"):
        parallel.make_mesh(MeshConfig(tensor=32), topology.describe("v6e", 32, 2))
    with pytest.raises(LensError, match=r"the 2 slices have \[8, 16\] chips; all must have as many"):
        parallel.make_mesh(MeshConfig(), topology.describe("v6e", 32, 2)[8:])
    # Three chips are no cuboid of the torus, of two by two.
    with pytest.warns(LensWarning, match="mesh: host by host, since the 2x2 torus has no such mesh"):
        mesh = parallel.make_mesh(MeshConfig(), topology.describe("v6e", 4)[:3])
    check_rows(mesh, 6)


@pytest.mark.parametrize("sliced", [False, True])
def test_fsdp_stays_within_a_node(sliced):
    """One process a node; or one a GPU, where JAX counts what shares NVLink as a slice."""
    gpu = dataclasses.make_dataclass("Device", ["id", "process_index", "slice_index", "platform"], frozen=True)
    devices = [
        gpu(number, number if sliced else number // 8, number // 8 if sliced else None, "gpu") for number in range(64)
    ]
    np.random.default_rng(0).shuffle(devices)
    mesh = parallel.make_mesh(MeshConfig(data=-1, fsdp=8), devices)
    assert all({device.id // 8 for device in part.flat} == {node} for node, part in enumerate(mesh.devices))
    check_rows(mesh, 128)
    # Four hosts along `tensor` read the same rows.
    mesh = parallel.make_mesh(MeshConfig(tensor=32), devices)
    check_rows(mesh, 4)
    assert mesh.shape == dict(zip(AXES, (1, 2, 32, 1)))


def test_rows_without_a_mesh_and_wrong_ones():
    assert parallel.rows_of_host(None, 3).tolist() == [0, 1, 2]
    assert parallel.global_rows(None, 3) == 3
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=4), topology.describe("v6e", 8))
    with pytest.raises(LensError, match=r"a batch of 12 images cannot be split .*; give a multiple of 8"):
        parallel.rows_of_host(mesh, 12, 0)
    with pytest.raises(LensError, match=r"data: 3 rows for a host whose devices hold 4 of 8 parts"):
        parallel.global_rows(mesh, 3, 0)
