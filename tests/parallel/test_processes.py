"""Several processes: who the environment says we are, one line where it is wrong, and two processes that meet."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from lens_jax import cli
from lens_jax.errors import LensError
from lens_jax.parallel import processes as distributed
from lens_jax.parallel.processes import Cluster, detect

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "JAX_COORDINATOR_ADDRESS": "a:1",
}


def without(environ: dict, *names: str) -> dict:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "cluster"),
    [
        ({}, None),
        (EXPLICIT, Cluster("environment", "a:1", 4, 3)),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (EXPLICIT | {"LENS_DISTRIBUTED": "0"}, None),
        # A pod of an Indexed Job knows its own number.
        (without(EXPLICIT, "JAX_PROCESS_ID") | {"JOB_COMPLETION_INDEX": "1"}, Cluster("environment", "a:1", 4, 1)),
        # A pod of one: an Indexed Job alone means nothing.
        ({"JOB_COMPLETION_INDEX": "1"}, None),
        # One task a node takes all devices, several share them.
        (SLURM, Cluster("Slurm", "node007:61441", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu-a,gpu-b"}, Cluster("Slurm", "gpu-a:61441", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[3,7-9]-ib,m"}, Cluster("Slurm", "n3-ib:61441", 4, 2)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, Cluster("Slurm", "node007:61441", 4, 2, (1,))),
        # srun --gpus-per-task=1 shows each task its own GPU, as number 0.
        (SLURM | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "3"}, Cluster("Slurm", "node007:61441", 4, 2)),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Cluster("Slurm", "node007:61441", 4, 2, (0, 1))),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "b:2"}, Cluster("Slurm", "b:2", 4, 2)),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, Cluster("Slurm", "node007:99", 4, 2)),
        (SLURM | EXPLICIT, Cluster("environment", "a:1", 4, 3)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "1", "JAX_COORDINATOR_ADDRESS": "b:2"}, None),
        # In the shell of an allocation of one node.
        (without(SLURM, "SLURM_STEP_NODELIST") | {"SLURM_JOB_NUM_NODES": "1"}, None),
        (MPI, Cluster("Open MPI", "a:1", 16, 9, (1,))),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Cluster("Open MPI", "a:1", 16, 9)),
        (MPI | SLURM, Cluster("Open MPI", "a:1", 16, 9, (1,))),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}, Cluster("TPU slice")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, Cluster("TPU slice")),
        ({"LENS_DISTRIBUTED": "1"}, Cluster("LENS_DISTRIBUTED")),
        ({"LENS_DISTRIBUTED": ""}, None),
    ],
)
def test_detect(environ, cluster):
    assert detect(environ) == cluster


TPU = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        (EXPLICIT, (3, 4)),
        (SLURM, (2, 4)),
        (TPU, (1, 4)),
        (TPU | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, (5, 8)),
    ],
)
def test_part_of_work_that_is_divided(environ, expected):
    """Nobody is met: no other process runs here."""
    assert distributed.part(environ) == expected


def test_part_takes_its_own_devices(monkeypatch):
    chosen = {}
    monkeypatch.setattr("jax.config.update", chosen.__setitem__)
    assert distributed.part(MPI) == (9, 16)
    assert chosen == {"jax_cuda_visible_devices": "1", "jax_rocm_visible_devices": "1"}
    assert distributed.part(EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "2,3"}) == (3, 4)
    assert chosen["jax_cuda_visible_devices"] == "2,3"
    with pytest.raises(LensError, match="JAX_LOCAL_DEVICE_IDS is 'all'; accepted: numbers of local devices"):
        distributed.part(EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "all"})
    with pytest.raises(LensError, match=r"LENS_DISTRIBUTED: .* nothing says which this is; give --host and --hosts"):
        distributed.part({"LENS_DISTRIBUTED": "1"})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without(EXPLICIT, "JAX_PROCESS_ID"), "JAX_PROCESS_ID is missing; set JAX_PROCESS_ID=0 to"),
        (without(EXPLICIT, "JAX_NUM_PROCESSES"), "JAX_NUM_PROCESSES is missing; set JAX_NUM_PROCESSES=2 or more"),
        (without(EXPLICIT, "JAX_COORDINATOR_ADDRESS"), "JAX_COORDINATOR_ADDRESS is missing; set JAX_COORDINATOR_A"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID are missing"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "node001"}, "'node001'; accepted: host:port"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_NUM_PROCESSES is 4 and JAX_PROCESS_ID is 4"),
        (EXPLICIT | {"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID is 'first'; it must be a whole number"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "not started by srun"),
        (without(SLURM, "SLURM_PROCID"), "SLURM_PROCID is missing"),
        (without(MPI, "JAX_COORDINATOR_ADDRESS"), "JAX_COORDINATOR_ADDRESS is missing"),
        (without(MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is missing"),
        ({"LENS_DISTRIBUTED": "yes"}, "LENS_DISTRIBUTED is 'yes'; accepted: 1"),
    ],
)  # fmt: skip
def test_half_set_is_one_line(environ, message):
    with pytest.raises(LensError) as error:
        detect(environ)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_train_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "quickstart"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("lens-jax: error: JAX_NUM_PROCESSES is set but JAX_COORDINATOR_ADDRESS")


def test_nobody_at_the_address():
    environ = EXPLICIT | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}"}
    with pytest.raises(LensError, match=r"process 3 of 4 could not reach process 0 at 127\.0\.0\.1:\d+ within 0 s"):
        distributed.initialize(environ, timeout=0)


TWO = """
from lens_jax import config
from lens_jax.pretraining.config import TrainConfig
from lens_jax.parallel import processes as distributed
import lens_jax.pretraining.job  # importing what trains must touch no device, or it is too late to join
import jax, numpy as np
config.load("quickstart", TrainConfig)
distributed.initialize()
distributed.initialize()
mesh = jax.make_mesh((2,), ("host",), axis_types=(jax.sharding.AxisType.Auto,))
spec = jax.sharding.PartitionSpec("host")
mine = np.array([jax.process_index() + 1.0])
ours = jax.make_array_from_process_local_data(jax.sharding.NamedSharding(mesh, spec), mine)
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "host"), mesh=mesh, in_specs=spec, out_specs=spec))(ours)
print("total", total.addressable_data(0))
"""


def run_two(script: str) -> tuple[list[int], list[tuple[str, str]]]:
    """Exit codes, and what went to stdout and stderr, of two processes."""
    address = f"127.0.0.1:{_free_port()}"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "XLA_"))}
    environ |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environ | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], ended


def test_two_processes_meet():
    codes, ended = run_two(TWO)
    assert codes == [0, 0], ended
    # Gloo, the collectives of the CPU, has its own word to say.
    first, second = ([line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in ended)
    assert first == ["process 0 of 2 (environment), 1 local devices, 2 in all", "total [3.]"]
    assert second == ["total [3.]"]


# A mesh in which the hosts' devices take turns, as on a torus: neither has one block of the rows.
TURNS = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from lens_jax.parallel import processes as distributed
distributed.initialize()
import numpy as np
from jax.sharding import AxisType, Mesh
from lens_jax import parallel
devices = np.array(jax.devices()).reshape(2, 2, 2).transpose(1, 0, 2)
mesh = Mesh(devices.reshape(2, 2, 1, 2), parallel.AXES, axis_types=(AxisType.Explicit,) * 4)
rows = parallel.rows_of_host(mesh, 8)
latents = np.arange(8 * 6 * 3, dtype=np.float32).reshape(8, 6, 3)
whole = {"latents": latents, "text_lengths": np.arange(8, dtype=np.int32)}
batch = parallel.place_batch({name: value[rows] for name, value in whole.items()} | {"n_image": np.int32(6)}, mesh)
assert batch["latents"].shape == (8, 6, 3) and batch["n_image"].shape == ()
for name, value in whole.items():
    for shard in batch[name].addressable_shards:
        np.testing.assert_array_equal(shard.data, value[shard.index])
    np.testing.assert_array_equal(parallel.local_copy(batch[name], mesh), value)
largest = int(parallel.largest(10 * jax.process_index(), mesh))
print("rows", rows.tolist(), "largest", largest, "of", parallel.global_rows(mesh, len(rows)))
"""


def test_rows_of_hosts_that_take_turns():
    codes, ended = run_two(TURNS)
    assert codes == [0, 0], ended
    said = [out.splitlines()[-1] for out, _ in ended]
    assert said == ["rows [0, 1, 4, 5] largest 10 of 8", "rows [2, 3, 6, 7] largest 10 of 8"]


# Nothing that fails: each waits for its own disk, say, and only the heartbeat can tell that the other is gone.
ONE_DIES = """
import os, signal, time
from lens_jax.parallel import processes as distributed
distributed.initialize(heartbeat=5)
import jax
if jax.process_index() == %d:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(300)
"""


@pytest.mark.parametrize("dies", [0, 1])
def test_heartbeat_ends_who_is_left_with_a_line(dies):
    codes, ended = run_two(ONE_DIES % dies)
    assert codes[dies] == -signal.SIGKILL
    assert codes[1 - dies] == -signal.SIGABRT
    line = f"lens-jax: error: process {1 - dies} of 2: another process is gone, its own log says why"
    assert ended[1 - dies][1].splitlines()[-1].startswith(line)


FAILS = """
from lens_jax.parallel import processes as distributed
from lens_jax.errors import LensError
distributed.initialize()
import jax, time
with distributed.ending_alone():
    if jax.process_index() == 1:
        raise LensError("shard 7 is gone")
    time.sleep(300)
"""


def test_one_that_fails_does_not_wait_for_the_others():
    """Its own line and exit code; the other, not in a collective here, is told by the heartbeat's channel or killed."""
    script = FAILS.replace("initialize()", "initialize(heartbeat=5)")
    codes, ended = run_two(script)
    assert codes[1] == 2
    assert ended[1][1].splitlines()[-1] == "lens-jax: error: process 1 of 2: shard 7 is gone"
    assert codes[0] == -signal.SIGABRT


# JAX lets them end two seconds apart here, and five minutes otherwise.
APART = """
import functools, os, signal, time
import jax
jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=2)
from lens_jax.parallel import processes as distributed
distributed.initialize(heartbeat=5)
with distributed.ending_alone():
    if jax.process_index() == %d:
        time.sleep(5)
        if %r:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("late", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_may_end_much_later(late):
    codes, ended = run_two(APART % (late, False))
    assert codes == [0, 0], ended


def test_who_waits_at_the_end_is_told_that_the_other_is_gone():
    codes, ended = run_two(APART % (0, True))
    assert codes[0] == -signal.SIGKILL
    assert codes[1] not in (0, -signal.SIGKILL)
    assert "process 1 of 2: another process is gone" in ended[1][1].splitlines()[-1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_that_is_taken_is_said():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        environ = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0",
        }  # fmt: skip
        with pytest.raises(LensError, match=f"process 0 cannot listen at port {port} .*another run on this host"):
            distributed.initialize(environ)
