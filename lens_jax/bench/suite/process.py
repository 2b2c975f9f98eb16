"""A part in a process of its own, followed until it ends, overruns its time or takes too much memory, or is ended."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lens_jax.bench.suite.case import Setting

# Between looks at the memory of a child.
_LOOK_SECONDS = 0.5
# For a child to write where it was before it is killed, and to be gone afterwards.
_LAST_WORDS_SECONDS = 2.0
_GONE_SECONDS = 10.0


@dataclasses.dataclass
class Ending:
    """How a process of a part ended."""

    # Cases that were reported, whatever became of them.
    done: list[str]
    # The case in which it ended before its time, "" if in none.
    case: str
    # Why it ended before its time, or "".
    why: str
    # Seconds since that case (or the process) began.
    seconds: float
    # It could not be ended, and may still hold the device.
    stuck: bool = False


def run_cases(
    module: str,
    setting: Setting,
    done: list[str],
    deadline: float,
    log: Path,
    receive: Callable[[dict], None],
    environment: dict[str, str],
    memory_bytes: int,
    stopped: Callable[[], int] = lambda: 0,
) -> Ending:
    """Start a child for the cases of `module` that are not `done`; `receive` gets each case's end as it is reported.

    deadline: time.monotonic() at which the child is ended, as it is when `stopped` no longer says 0. Its output is
    appended to `log`. However this function is left, the child is gone.
    """
    read, write = os.pipe()
    request = {
        "module": module,
        "setting": dataclasses.asdict(setting),
        "done": done,
        "left": deadline - time.monotonic(),
        "report": write,
    }
    # -P: beside a source tree the installed package is meant.
    command = [sys.executable, "-P", "-m", "lens_jax.bench.suite.child", json.dumps(request)]
    with open(log, "ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[write],
            env=environment,
            # Its own group: a Ctrl-C is for the parent, which then ends the group.
            start_new_session=True,
        )
    os.close(write)
    ending = None
    try:
        ending = _follow(child, read, deadline, receive, memory_bytes, stopped)
        return ending
    finally:
        os.close(read)
        gone = end_group(child)
        if ending is not None:
            ending.stuck = not gone


def _follow(child: subprocess.Popen, read: int, deadline: float, receive, memory_bytes: int, stopped) -> Ending:
    buffer, done, case, begun, most = b"", [], "", time.monotonic(), float("inf")

    def ending(why: str) -> Ending:
        return Ending(done, case, why, time.monotonic() - begun)

    while True:
        now = time.monotonic()
        if stopped():
            return ending("told to stop")
        if now >= deadline:
            return ending("no time left")
        if now >= begun + most:
            return ending(f"took more than {most:g} s")
        if _resident_bytes(child.pid) > memory_bytes:
            return ending(f"took more than {memory_bytes / 1e9:.1f} GB of the host's memory")
        wait = min(_LOOK_SECONDS, deadline - now, begun + most - now)
        if not select.select([read], [], [], max(0, wait))[0]:
            continue
        chunk = os.read(read, 2**16)
        if not chunk:
            break
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message.pop("kind") == "begin":
                case, most, begun = message["case"], message["most"], time.monotonic()
            else:
                done.append(message["case"])
                case, most, begun = "", float("inf"), time.monotonic()
                receive(message)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GONE_SECONDS)
    code = child.returncode
    if code == 0:
        return ending("")
    if code is None:
        return ending("closed its report and did not end")
    return ending(f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}")


def end_group(child: subprocess.Popen) -> bool:
    """End a child and all that it started; whether it is gone. Python's stacks go to its log."""
    if child.poll() is None:
        _signal_group(child, signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_LAST_WORDS_SECONDS)
    _signal_group(child, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GONE_SECONDS)
    return child.returncode is not None


def _signal_group(child: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):  # no Linux, or it has just ended
        return 0


def available_bytes() -> int:
    """Memory of the host that is free or can be made so; a very large number where the kernel does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, IndexError, ValueError):
        return 2**62
