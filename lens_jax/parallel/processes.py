"""Several processes as one run: who this process is, and where the others meet.

The environment says it: Slurm, Open MPI, a TPU slice, or three variables that anything else can set. One process needs
none of this and is left alone.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lens_jax.console import make_console
from lens_jax.errors import LensError

# Images are pulled and nodes boot at their own pace.
INITIALIZATION_SECONDS = 600

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# What each of the three takes.
_ACCEPTED = {
    ADDRESS: f"{ADDRESS}=host:port of process 0",
    COUNT: f"{COUNT}=2 or more",
    INDEX: f"{INDEX}=0 to {COUNT} - 1 (in a Kubernetes Indexed Job, JOB_COMPLETION_INDEX is taken)",
}


@dataclass(frozen=True)
class Cluster:
    """This process among its peers. What is None is left to JAX's own detection."""

    # Who says so.
    source: str
    # host:port where process 0 listens.
    coordinator: str | None = None
    # Processes in all.
    processes: int | None = None
    # Which of them this is.
    process: int | None = None
    # Local devices this process takes; None takes all.
    devices: tuple[int, ...] | None = None


def detect(environ: Mapping[str, str]) -> Cluster | None:
    """The cluster that the environment describes, None for a single process; LensError where it is half described."""
    wanted = environ.get("LENS_DISTRIBUTED") or None
    if wanted not in (None, "0", "1"):
        raise LensError(f"LENS_DISTRIBUTED is {wanted!r}; accepted: 1 (several processes), 0 (one), or unset (detect)")
    if wanted == "0":
        return None
    # Open MPI before Slurm: mpirun within an allocation has Slurm's variables too, and those count its own helpers.
    if COUNT in environ or INDEX in environ:
        cluster = _explicit(environ)
    elif _integer(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        cluster = _open_mpi(environ)
    elif "SLURM_JOB_ID" in environ:
        cluster = _slurm(environ)
    else:
        cluster = None
    if cluster is not None:
        return cluster if cluster.processes > 1 else None
    # A host of a TPU slice is told the names of all, or the number of slices where there are several.
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or _integer(environ, "MEGASCALE_NUM_SLICES", 1) > 1:
        return Cluster("TPU slice")
    if wanted == "1":
        return Cluster("LENS_DISTRIBUTED")
    if ADDRESS in environ:
        raise _half_set((ADDRESS,), (COUNT, INDEX))
    return None


def part(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(number of this process, of how many) for work that is divided without talking; before any JAX operation.

    This process gets its own devices, but joins nobody: JAX ends processes that have met unless all end within some
    minutes of each other, or when one of them fails.
    """
    cluster = detect(environ)
    if cluster is None:
        return 0, 1
    import jax

    devices = cluster.devices or _listed_devices(environ)
    if devices is not None:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, ",".join(map(str, devices)))
    if cluster.process is not None:
        return cluster.process, cluster.processes
    worker = _integer(environ, "TPU_WORKER_ID", None)
    if worker is None:
        # The TPU's own runtime knows the hosts of its slice.
        found = jax.process_index(), jax.process_count()
        if found[1] == 1 and jax.default_backend() != "tpu":
            raise LensError(
                f"{cluster.source}: several processes are wanted, but nothing says which this is; give --host and "
                f"--hosts, or set {', '.join(_ACCEPTED.values())}"
            )
        return found
    hosts = len((environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or "").split(","))
    slices, slice_ = _integer(environ, "MEGASCALE_NUM_SLICES", 1), _integer(environ, "MEGASCALE_SLICE_ID", 0)
    return slice_ * hosts + worker, slices * hosts


def initialize(
    environ: Mapping[str, str] = os.environ, timeout: int = INITIALIZATION_SECONDS, heartbeat: int = 100
) -> None:
    """Join the other processes, before any JAX operation. Does nothing in a single process, or when called again.

    A process that is silent for `heartbeat` seconds is dead to the others.
    """
    cluster = detect(environ)
    if cluster is None:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    # It would take SIGTERM for itself, and a process not yet in its loop would ignore it. The loop has its own way to
    # stop all processes at one step.
    jax.config.update("jax_enable_preemption_service", False)
    if cluster.coordinator and cluster.process:
        _wait_for(cluster, timeout)
    elif cluster.coordinator and cluster.process == 0:
        _check_port(cluster)
    # Process 0 waits in silence otherwise.
    waiting = threading.Timer(30, _say_waiting, (cluster,))
    waiting.daemon = True
    if cluster.process == 0:
        waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.processes,
            process_id=cluster.process,
            local_device_ids=cluster.devices,
            # Where we know everything: left to itself, JAX gives a process under Slurm one device only.
            cluster_detection_method=None if cluster.coordinator is None else "deactivate",
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        raise LensError(
            f"{cluster.source}: several processes are wanted, but JAX found no cluster ({error}); "
            f"set {', '.join(_ACCEPTED.values())}"
        ) from None
    finally:
        waiting.cancel()
    _explain_abort()
    # All processes ask, since the devices are exchanged between them; one says it.
    local, everywhere = jax.local_device_count(), jax.device_count()
    if jax.process_index() == 0:
        make_console().print(
            f"process 0 of {jax.process_count()} ({cluster.source}), {local} local devices, {everywhere} in all"
        )


@contextlib.contextmanager
def ending_alone() -> Iterator[None]:
    """Of several processes, ends one at once when the block fails, with one line; when it succeeds, all end together.

    After a failure Python would first wait until all others have ended too, and those wait for this one. After success
    JAX would wait for five minutes, and then end with an error whoever is still drawing samples, say.
    """
    import jax

    if jax.process_count() == 1:
        yield
        return
    who = f"process {jax.process_index()} of {jax.process_count()}"
    try:
        yield
        _wait_for_all()
    except LensError as error:
        code, line = 2, f"lens-jax: error: {who}: {error}"
    except KeyboardInterrupt:
        code, line = 130, f"lens-jax: interrupted: {who}"
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        if not _LOST.search(reason):
            traceback.print_exc()
        code, line = 2, f"lens-jax: error: {who}: {_gone(reason[:200])}"
    except BaseException:
        code, line = 1, traceback.format_exc().rstrip()
    else:
        return
    print(line, file=sys.stderr, flush=True)
    if jax.process_index() == 0:
        # The others lose their meeting point with it. Where all fail alike, each shall say so first.
        time.sleep(1)
    os._exit(code)


def _wait_for_all() -> None:
    """Until every process is here; as long as they live, of which the heartbeat tells."""
    # As Orbax does; what is public synchronises through devices, and these may have work.
    from jax._src.distributed import global_state

    if global_state.client is not None:
        global_state.client.wait_at_barrier("lens-jax: the end", 1000 * 7 * 86_400)  # milliseconds


# What collectives and JAX's service say when another process is gone, over Gloo, NCCL and gRPC.
_LOST = re.compile(r"gloo|nccl|connection|unavailable|deadline|heartbeat|aborted", re.IGNORECASE)


def _gone(reason: str) -> str:
    return (
        f"another process is gone, its own log says why ({reason}); start all again to go on from the last checkpoint"
    )


def _explain_abort() -> None:
    """A last line before JAX ends this process, which it does in C++ where no Python handler is called.

    It does so when process 0 is gone, which the others notice at once, or any other has been silent for too long.
    """
    import jax

    who = f"process {jax.process_index()} of {jax.process_count()}"
    line = f"lens-jax: error: {who}: {_gone('JAX ended this one, see above')}\n".encode()
    libc = ctypes.CDLL(None)

    def explain(number):
        os.write(2, line)
        libc.signal(number, None)  # the default: when this returns, abort() goes on to end the process

    _explain_abort.keep = handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
    libc.signal(int(signal.SIGABRT), handler)


def _explicit(environ: Mapping[str, str]) -> Cluster:
    """The three variables; an Indexed Job numbers its pods by itself."""
    environ = {INDEX: environ.get("JOB_COMPLETION_INDEX"), **environ}
    names = (ADDRESS, COUNT, INDEX)
    count = _integer(environ, COUNT, None)
    if count == 1:
        return Cluster("environment", processes=1)
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise _half_set([name for name in names if name not in missing], missing)
    index = _integer(environ, INDEX, None)
    if not (count > 1 and 0 <= index < count):
        raise LensError(f"{COUNT} is {count} and {INDEX} is {index}; set {_ACCEPTED[COUNT]}, {_ACCEPTED[INDEX]}")
    return Cluster("environment", _address(environ[ADDRESS]), count, index)


def _open_mpi(environ: Mapping[str, str]) -> Cluster:
    count, index = (_integer(environ, f"OMPI_COMM_WORLD_{name}", None) for name in ("SIZE", "RANK"))
    if index is None:
        raise LensError("OMPI_COMM_WORLD_SIZE is set but OMPI_COMM_WORLD_RANK is missing; start with mpirun")
    if not environ.get(ADDRESS):
        raise LensError(
            f"OMPI_COMM_WORLD_SIZE is {count} but {ADDRESS} is missing, and Open MPI does not say where rank 0 is; "
            f"set {_ACCEPTED[ADDRESS]} (mpirun -x {ADDRESS}=host:port)"
        )
    shared = _integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 1) > 1
    local = _integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0)
    return Cluster("Open MPI", _address(environ[ADDRESS]), count, index, _own_device(environ, shared, local))


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    if "SLURM_STEP_NODELIST" not in environ:
        # The shell of an allocation. On one node it has all devices; on several it would leave the others idle.
        nodes = _integer(environ, "SLURM_JOB_NUM_NODES", 1)
        if nodes > 1:
            raise LensError(
                f"SLURM_JOB_NUM_NODES is {nodes} but SLURM_STEP_NODELIST is missing: not started by srun; start with "
                "srun, or set LENS_DISTRIBUTED=0 to train in this process alone"
            )
        return None
    count, index = _integer(environ, "SLURM_NTASKS", 1), _integer(environ, "SLURM_PROCID", None)
    if count == 1:
        return Cluster("Slurm", processes=1)
    if index is None:
        raise LensError(f"SLURM_NTASKS is {count} but SLURM_PROCID is missing; start with srun")
    coordinator = environ.get(ADDRESS)
    if not coordinator:
        # Rank 0 runs on the first node: of node[007-9,12]-ib,other this is node007-ib. A port of the job's own keeps
        # two jobs on a node apart.
        names = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", environ["SLURM_STEP_NODELIST"])
        port = environ.get("JAX_COORDINATOR_PORT") or 61440 + _integer(environ, "SLURM_JOB_ID", 0) % 4096
        coordinator = f"{''.join(part or '' for part in names.groups())}:{port}"
    shared = count > _integer(environ, "SLURM_STEP_NUM_NODES", 1)
    devices = _own_device(environ, shared, _integer(environ, "SLURM_LOCALID", 0))
    return Cluster("Slurm", _address(coordinator), count, index, devices)


def _own_device(environ: Mapping[str, str], shared: bool, local: int) -> tuple[int, ...] | None:
    """The device of one of several processes on a node, unless the launcher shows it only its own already."""
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return _listed_devices(environ)
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    return (local,) if shared and (not visible or "," in visible) else None


def _listed_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    listed = environ.get("JAX_LOCAL_DEVICE_IDS")
    if not listed:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", listed):
        raise LensError(f"JAX_LOCAL_DEVICE_IDS is {listed!r}; accepted: numbers of local devices, e.g. 0,1")
    return tuple(int(index) for index in listed.split(","))


def _integer(environ: Mapping[str, str], name: str, default: int | None) -> int | None:
    value = environ.get(name)
    if not value:
        return default
    if not value.strip().isdecimal():
        raise LensError(f"{name} is {value!r}; it must be a whole number")
    return int(value)


def _address(value: str) -> str:
    if not re.fullmatch(r"\S+:\d+", value):
        raise LensError(f"{ADDRESS} is {value!r}; accepted: host:port, e.g. node001:55527")
    return value


def _half_set(given, missing) -> LensError:
    return LensError(
        f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set but {' and '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} missing; set {', '.join(_ACCEPTED[name] for name in missing)}"
    )


def _wait_for(cluster: Cluster, timeout: float) -> None:
    """Wait until process 0 listens. JAX would abort the process without saying where it had tried to connect."""
    host, port = cluster.coordinator.rsplit(":", 1)
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise LensError(
                    f"process {cluster.process} of {cluster.processes} could not reach process 0 at "
                    f"{cluster.coordinator} within {timeout:.0f} s ({error}); is it running, and is the port open?"
                ) from None
        time.sleep(1)


def _check_port(cluster: Cluster) -> None:
    """JAX would end this process with a trace of C++ where another program listens at its port."""
    port = int(cluster.coordinator.rpartition(":")[2])
    try:
        with socket.socket() as probe:
            # As the server does it, which takes a port whose last connections are still being closed.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise LensError(
            f"process 0 cannot listen at port {port} ({error.strerror}): is another run on this host? Set "
            f"{ADDRESS}=host:port with another port for all processes"
        ) from None


def _say_waiting(cluster: Cluster) -> None:
    where = f"at {cluster.coordinator} for {cluster.processes - 1} others"
    make_console().print(f"process 0 of {cluster.processes} waits {where}")
