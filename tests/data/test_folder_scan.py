"""A folder that is larger than memory: sorted on disk, in an order that depends on names alone."""

import itertools
import json
import os
import tracemalloc

import numpy as np
import pytest

from lens_jax.data import external_sort
from lens_jax.data.external_sort import DiskSort
from lens_jax.data.sources import folder
from lens_jax.data.sources.folder import Found, Problem, Scan


@pytest.mark.parametrize("room", [1 << 20, 1000])
def test_sorting_on_disk_is_sorting(tmp_path, monkeypatch, room):
    """Also through three levels of merged runs, equal keys in the order in which they came."""
    monkeypatch.setattr(external_sort, "_FAN", 3)
    rng = np.random.default_rng(0)
    pairs = [(bytes(rng.integers(97, 100, rng.integers(0, 4)).tolist()), str(n).encode()) for n in range(300)]
    sorter = DiskSort(tmp_path, room)
    for pair in pairs:
        sorter.add(*pair)
    assert bool(list(tmp_path.iterdir())) == (room == 1000)
    assert list(sorter.sorted()) == sorted(pairs, key=lambda pair: pair[0])
    assert list(tmp_path.iterdir()) == []


def scanned(root, work, shuffle=None) -> list[Found | Problem]:
    work.mkdir(exist_ok=True)
    scan = Scan(root, work, shuffle=shuffle)
    rows = [item for item in scan.look() if item]
    return [*rows, *scan.items()]


def test_order_and_captions_do_not_depend_on_how_files_are_listed(tmp_path, monkeypatch):
    """Names that sort differently as paths and as texts, tables that say something of other folders' images."""
    root = tmp_path / "images"
    names = ["b.png", "b/1.png", "b-2.png", "b/c/2.png", "a.jfif", "b.d/3.png", "é.png", "z/4.webp"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    table = [("b/c/2.png", "one"), ("./b/1.png", "two"), ("z/5.png", "gone"), ("b/c/../1.png", "three"), ("b", "no")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in table]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    (root / "b" / "c" / "metadata.csv").write_text("file_name,text\n2.png,four\n2.png,five, six\n")
    (root / "linked").symlink_to(root / "b")
    found = scanned(root, tmp_path / "work")
    images = {item.name: item.captions for item in found if isinstance(item, Found)}
    assert list(images) == ["a.jfif", "b/1.png", "b/c/2.png", "b-2.png", "b.d/3.png", "b.png", "z/4.webp", "é.png"]
    assert {name: texts for name, texts in images.items() if texts} == {
        "b/1.png": {"en": ["two", "three"]},
        "b/c/2.png": {"en": ["four", "one"]},
    }
    assert [str(item).split(" (")[0] for item in found if isinstance(item, Problem)] == [
        "b/c/metadata.csv:3: bad row",
        "metadata.jsonl:5: missing image",
        "linked: linked folder",
        "metadata.jsonl:3: missing image",
    ]

    original = os.scandir

    class Reversed:
        def __init__(self, path):
            with original(path) as entries:
                self._entries = list(entries)[::-1]

        def __enter__(self):
            return iter(self._entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    monkeypatch.setattr(folder, "ROOM", 200)
    assert scanned(root, tmp_path / "work") == found
    drawn = scanned(root, tmp_path / "work", shuffle=3)
    assert sorted(map(str, drawn)) == sorted(map(str, found))
    assert [item.name for item in drawn if isinstance(item, Found)] != list(images)
    assert scanned(root, tmp_path / "work", shuffle=3) == drawn


def test_memory_does_not_grow_with_the_folder(tmp_path, monkeypatch):
    """What our code holds at its most, for 500 images and for eight times as many."""
    monkeypatch.setattr(folder, "ROOM", 20_000)
    monkeypatch.setattr(external_sort, "_FAN", 4)
    ours = tracemalloc.Filter(True, "*/lens_jax/data/*")

    def most_held(count: int) -> int:
        root, work, held = tmp_path / f"images-{count}", tmp_path / f"work-{count}", []
        root.mkdir()
        work.mkdir()
        with open(root / "metadata.jsonl", "w") as file:
            for n in range(count):
                (root / f"{n:06d}.png").touch()
                file.write(json.dumps({"file_name": f"{n:06d}.png", "text": "x" * 300}) + "\n")
        scan, images = Scan(root, work, shuffle=0), 0
        for step, item in enumerate(itertools.chain(scan.look(), scan.items())):
            images += isinstance(item, Found)
            if step % (count // 8) == count // 16:
                snapshot = tracemalloc.take_snapshot().filter_traces([ours])
                held.append(sum(trace.size for trace in snapshot.traces))
        assert images == count
        return max(held)

    tracemalloc.start()
    try:
        few, many = most_held(250), most_held(2000)
    finally:
        tracemalloc.stop()
    # The pairs in room, and a buffer for each run that is merged: four at most of each level.
    assert many < few + 40_000  # 23 bytes an image; it was 1,850
