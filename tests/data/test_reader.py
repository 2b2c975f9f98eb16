"""Reading from more shards than a process may have open."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from lens_jax.data.buckets import Bucket
from lens_jax.data.index import Index, load_index
from lens_jax.data.reader import RecordReader
from lens_jax.data.records import Record, encode
from lens_jax.data.writer import DataWriter
from lens_jax.errors import LensError

SHARDS = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three hundred shards of two records; the source of each says its position."""
    out = tmp_path_factory.mktemp("data")
    with DataWriter(out, [Bucket(2, 2)], shard_bytes=100) as writer:
        for n in range(2 * SHARDS):
            entry = encode(Record(image=b"x", captions={"en": ("x",)}, height=2, width=2, source=str(n)))
            writer.write("train", Bucket(2, 2), 0, entry, ["en"])
        index = writer.finish(source="folder", config={}, licence="", languages=("en",), holdout_languages=())
    assert index.streams[0].shards == SHARDS
    return out


def test_records_in_the_order_asked_for(data):
    index = load_index(data)
    stream, positions = index.streams[0], np.array([599, 0, 1, 300, 1, 42])
    reader = RecordReader(index, open_files=2)
    assert [int(record.source) for record in reader.read(stream, positions)] == positions.tolist()
    assert reader.read(stream, np.array([], int)) == []
    for bad in ([-1], [600]):
        with pytest.raises(LensError, match="train-2x2 has 600 records"):
            reader.read(stream, np.array(bad))


def test_shards_are_opened_once_and_closed_when_others_are_needed(data, monkeypatch):
    """Eight threads, a bound of ten: what is open stays in the bound, nothing is closed while it is read."""
    opened, closed, most, lock = [], [], [0], threading.Lock()
    original = Index.open

    def watched(self, shard):
        reader = original(self, shard)
        close = reader.close
        with lock:
            opened.append(shard.name)
            most[0] = max(most[0], len(opened) - len(closed))

        def closing():
            with lock:
                closed.append(shard.name)
            close()

        reader.close = closing
        return reader

    monkeypatch.setattr(Index, "open", watched)
    index = load_index(data)
    reader, failures = RecordReader(index, open_files=10), []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            positions = rng.integers(0, 2 * SHARDS, 30)
            if [int(r.source) for r in reader.read(index.streams[0], positions)] != positions.tolist():
                failures.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(opened) > SHARDS / 2
    assert most[0] <= 10
    reader.close()
    assert sorted(opened) == sorted(closed)
    # What was read last is still there: nothing is opened again for it.
    reader.read(index.streams[0], np.arange(10))
    opened.clear()
    reader.read(index.streams[0], np.arange(10))
    assert opened == []


LIMITED = """
import os, resource, sys, threading
import numpy as np
from lens_jax.data.index import load_index
from lens_jax.data.reader import RecordReader
from lens_jax.errors import LensError
index = load_index({data!r})
index.shard_records(index.streams[0])
RecordReader(index).read(index.streams[0], np.arange(1))
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
reader, order = RecordReader(index, open_files=64), np.random.default_rng(0).permutation(600)
read = []
def part(positions):
    for start in range(0, len(positions), 25):
        read.extend(int(record.source) for record in reader.read(index.streams[0], positions[start : start + 25]))
threads = [threading.Thread(target=part, args=(order[i::4],)) for i in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert sorted(read) == list(range(600)), len(read)
try:
    RecordReader(index, open_files=200).read(index.streams[0], order)
except LensError as error:
    print(error)
"""


def test_a_low_limit_of_open_files_is_kept_or_named(data):
    """In a process that may open 100 files all 300 shards are read; beyond the limit the error says what it is."""
    code = LIMITED.format(data=str(data))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "too many open files, this process may have 100; raise the limit: ulimit -n 400" in done.stdout
    assert "truncated" not in done.stdout
