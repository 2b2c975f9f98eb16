"""The process of a part: runs its cases one after another and reports each as soon as it is known.

python -m lens_jax.bench.suite.child REQUEST, where REQUEST is JSON: `module` with a function `cases(setting)`,
`setting`, `done` (names of cases to leave out), `left` (seconds) and `report` (a file descriptor). Reports are JSON
lines: `begin` before a case, with the most seconds that it may take, and `end` behind it, with its status and its
result or error.
"""

import faulthandler
import gc
import importlib
import json
import os
import resource
import sys
import threading
import time
import traceback

from lens_jax.bench.suite.case import Case, Setting


def main(request: dict) -> None:
    """Run the cases of a part; ends the process."""
    started = time.monotonic()
    _die_first()
    # Where a hang or a crash was goes to the log: the parent sends SIGABRT before SIGKILL.
    faulthandler.enable()

    def report(kind: str, **values) -> None:
        os.write(request["report"], (json.dumps({"kind": kind, **values}) + "\n").encode())

    setting = Setting(**request["setting"])
    try:
        cases = importlib.import_module(request["module"]).cases(setting)
    except Exception as error:
        report("end", case="", seconds=time.monotonic() - started, **_failure(error))
        cases = []
    for case in cases:
        if case.name in request["done"]:
            continue
        left = request["left"] - (time.monotonic() - started)
        if left < case.least:
            why = f"{left:.0f} s left, at least {case.least:g} needed"
            report("end", case=case.name, status="skipped", error=why, seconds=0.0)
            continue
        report("begin", case=case.name, most=case.most)
        print(f"== {setting.part}: {case.name}", flush=True)
        begun = time.monotonic()
        outcome = _run(case)
        report("end", case=case.name, seconds=time.monotonic() - begun, **outcome)
        gc.collect()  # what a case held on the device must not be in the way of the next
    # Not through the exit of Python: taking down a device's runtime has its own ways to hang.
    sys.stdout.flush()
    os._exit(0)


def _run(case: Case) -> dict:
    try:
        return {"status": "ok", "result": case.run()}
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> dict:
    """All of it to the log, and its beginning to the results: a compiler's message can be a page."""
    traceback.print_exception(error)
    return {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def _die_first() -> None:
    """Leave no core file, be the first that a kernel short of memory ends, and do not outlive the parent."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # no Linux, or not allowed
        pass
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
