"""Stages that do little, and in which a worker can be told to die. Imported by name, as workers unpickle them."""

import hashlib
import os
import signal
import time
from dataclasses import dataclass

import pyarrow as pa

from lens_jax.data.engine.readers import Problem
from lens_jax.data.engine.tables import PROBE, image_id
from lens_jax.errors import LensError


@dataclass(frozen=True)
class Bytes:
    """A probe that decodes nothing: a file is bad if it begins with BAD, and may take its process with it."""

    name: str = "probe"
    version: int = 1
    reads: tuple[str, ...] = ()
    # Seconds an image, so that there is time to kill.
    seconds: float = 0.0
    # A file: every image read adds a byte to it.
    reads_seen: str = ""
    # Its weights are not there.
    broken: bool = False

    def settings(self, config):
        return {"strict": config.strict_jpeg}

    def open(self, config):
        if self.broken:
            raise LensError("no such weights")
        return self._table

    def _table(self, given):
        rows = []
        for index, item in given.items():
            if self.reads_seen:
                with open(self.reads_seen, "ab") as file:
                    file.write(b".")
            row = {"id": image_id(given.source.name, item.key), "index": index, "key": item.key}
            if isinstance(item, Problem):
                row |= {"problem": item.reason, "detail": item.detail}
            else:
                time.sleep(self.seconds)
                row |= {"sha256": hashlib.sha256(item.data).digest(), "bytes": len(item.data)}
                self._act(item.data)
                row["problem"] = "corrupt data" if item.data.startswith(b"BAD") else None
            rows.append(row)
        return pa.Table.from_pylist(rows, PROBE)

    def _act(self, data):
        if data.startswith(b"KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        if data.startswith(b"HANG"):
            time.sleep(3600)
        if data.startswith(b"RAISE"):
            raise ValueError("not foreseen")
        if data.startswith(b"MEMORY"):
            bytearray(1 << 36)


@dataclass(frozen=True)
class Length:
    """A stage that reads the first: how long each key is."""

    name: str = "measure"
    version: int = 1
    reads: tuple[str, ...] = ("probe",)

    def settings(self, config):
        return {}

    def open(self, config):
        return self._table

    def _table(self, given):
        keys = [item.key for _, item in given.items()]
        assert keys == given.tables["probe"]["key"].to_pylist()
        return pa.table({"id": given.tables["probe"]["id"], "length": pa.array(map(len, keys), pa.int32())})
