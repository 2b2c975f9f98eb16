"""Every kind of source: what was put into it comes out of it, whole and in one order, however it is cut into units."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lens_jax.data.buckets import Bucket
from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import Item, Problem, read, units
from lens_jax.data.engine.readers import folder as folder_reader
from lens_jax.data.records import Record, encode
from lens_jax.data.writer import DataWriter
from lens_jax.errors import LensError

pa = pytest.importorskip("pyarrow", reason="needs the extra data")
import pyarrow.parquet as pq  # noqa: E402

COUNT = 23
# Names as users have them: brackets, spaces, other scripts, quotes.
NAMES = [f"{number:02d} [{'ä猫é'[number % 3]}] 'x'" for number in range(COUNT)]


def image(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [image(number) for number in range(COUNT)]
TEXTS = [f"image {number}, of noise" for number in range(COUNT)]


def write_folder(root):
    root.mkdir()
    for name, data, text in zip(NAMES[:9], IMAGES, TEXTS):
        (root / f"{name}.png").write_bytes(data)
        (root / f"{name}.txt").write_text(text)


def write_imagefolder(root):
    """As the hub has it: a folder a split, a table in parquet at the top."""
    (root / "train").mkdir(parents=True)
    names = [f"train/{name}.png" for name in NAMES]
    for name, data in zip(names, IMAGES):
        (root / name).write_bytes(data)
    pq.write_table(
        pa.table({"file_name": names, "text": TEXTS, "other": list(range(COUNT))}), root / "metadata.parquet"
    )


def add(tar, name: str, data: bytes, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, numbers=range(COUNT), form=tarfile.PAX_FORMAT, prefix="", noise=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for number in numbers:
            add(tar, f"{prefix}{NAMES[number]}.png", IMAGES[number] + bytes(noise))
            add(tar, f"{prefix}{NAMES[number]}.txt", TEXTS[number].encode())
            add(tar, f"{prefix}{NAMES[number]}.json", json.dumps({"url": f"http://x/{number}", "key": number}).encode())


def write_tars(root):
    """Long names, in the two ways that tars have for them, and sizes that make several units of one."""
    write_tar(root / "deep" / "b.tar", range(10, COUNT), tarfile.GNU_FORMAT, "x" * 90 + "/" + "y" * 90 + "/", 200_000)
    write_tar(root / "a.tar", range(10), tarfile.PAX_FORMAT, "ä" * 80 + "/")


def write_parquet(root):
    """Two files: bytes with the usual names, and what `datasets` writes, in row groups of several sizes."""
    root.mkdir()
    plain = pa.table({"jpg": IMAGES[:10], "TEXT": TEXTS[:10], "URL": [f"http://x/{n}" for n in range(10)]})
    pq.write_table(plain, root / "a.parquet", row_group_size=3)
    hub = pa.table({"image": [{"bytes": data, "path": None} for data in IMAGES[10:]], "caption": TEXTS[10:]})
    pq.write_table(hub, root / "b [1].parquet", row_group_size=8)


def write_table(root):
    """What img2dataset leaves: one shard as a tar, one as files; the third row of each was not downloaded."""
    root.mkdir()
    for shard, numbers in (("00000", range(12)), ("00001", range(12, COUNT))):
        lost = numbers[2]
        rows = {
            "key": [f"{number:09d}" for number in numbers],
            "url": [f"http://x/{number}" for number in numbers],
            "caption": [TEXTS[number] for number in numbers],
            "status": ["failed_to_download" if number == lost else "success" for number in numbers],
            "error_message": ["HTTP Error 404" if number == lost else None for number in numbers],
        }
        pq.write_table(pa.table(rows), root / f"{shard}.parquet", row_group_size=5)
    with tarfile.open(root / "00000.tar", "w") as tar:
        for number in [n for n in range(12) if n != 2]:
            add(tar, f"{number:09d}.jpg", IMAGES[number])
            add(tar, f"{number:09d}.txt", b"not this one")
    (root / "00001").mkdir()
    for number in [n for n in range(12, COUNT) if n != 14]:
        (root / "00001" / f"{number:09d}.jpg").write_bytes(IMAGES[number])


def write_lens(root):
    buckets = [Bucket(8, 8)]
    with DataWriter(root, buckets, 2000) as writer:
        for number, (data, text) in enumerate(zip(IMAGES, TEXTS)):
            split = "validation" if number % 5 == 0 else "train"
            record = Record(data, {"en": (text,)}, 8, 8, licence="CC0", meta={"url": f"http://x/{number}"})
            writer.write(split, buckets[0], 0, encode(record), ["en"])
        writer.finish(source="made up", config={}, licence="CC0", languages=["en"], holdout_languages=[])


WRITERS = {
    "folder": (write_folder, 9, set()),
    "imagefolder": (write_imagefolder, COUNT, set()),
    "webdataset": (write_tars, COUNT, set()),
    "parquet": (write_parquet, COUNT, set()),
    "table": (write_table, COUNT - 2, {"not downloaded"}),
    "lens": (write_lens, COUNT, set()),
}


def everything(source: Source, unit_rows: int) -> list[Item | Problem]:
    found = units(source, unit_rows)
    order = [(unit.source, unit.path.replace("/", "\0"), unit.part) for unit in found]
    assert order == sorted(order)
    assert len({unit.id for unit in found}) == len(found)
    if unit_rows < COUNT and source.kind != "webdataset":
        assert len(found) > 1
    return [item for unit in found for item in read(source, unit)]


@pytest.mark.parametrize("kind", WRITERS)
def test_what_was_put_in_comes_out_however_it_is_cut(tmp_path, kind):
    write, count, problems = WRITERS[kind]
    root = tmp_path / "a [folder] of ü"
    write(root)
    source = Source("mine", kind, str(root), caption="keep")
    found = everything(source, 7)
    assert everything(source, 1000) == found
    assert len({item.key for item in found}) == len(found)
    assert {item.reason for item in found if isinstance(item, Problem)} == problems
    images = [item for item in found if isinstance(item, Item)]
    assert len(images) == count
    # All in the order of their names here, so by number; noise behind the images of one tar is no part of them.
    numbers = [number for number in range(COUNT) if kind != "table" or number not in (2, 14)][:count]
    if kind == "lens":  # its splits are streams, one after the other
        numbers = sorted(numbers, key=lambda number: number % 5 == 0)
    for item, number in zip(images, numbers):
        assert item.data.startswith(IMAGES[number])
        assert not item.data[len(IMAGES[number]) :].strip(b"\0")
        assert item.texts == {"en": (TEXTS[number],)}
        if kind in ("table", "webdataset", "lens") or (kind == "parquet" and number < 10):
            assert item.url == f"http://x/{number}"
        assert item.licence == ("CC0" if kind == "lens" else "")
    if kind == "webdataset":
        assert len(units(source, 1)) > 10


def test_tfds_is_read_without_tensorflow_and_imports_what_it_names_from_nowhere_else(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    write_lens(tmp_path / "data")
    code = f"""
import sys
from lens_jax.data.tfds_builder import as_tfds
from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import read, units
from lens_jax.data.index import load_index
builder = as_tfds({str(tmp_path / "data")!r}, {str(tmp_path / "tfds")!r})
source = Source("mine", "tfds", str(builder.data_dir), caption="keep")
found = {{rows: [item for unit in units(source, rows) for item in read(source, unit)] for rows in (7, 1000)}}
assert found[7] == found[1000] and len(units(source, 7)) > 3
written = {{}}
for split in ("train", "validation"):
    for record in load_index({str(tmp_path / "data")!r}).records(split):
        written[record.captions["en"]] = record.image
assert {{item.texts["en"]: item.data for item in found[7]}} == written and len(written) == {COUNT}
assert "tensorflow" not in sys.modules
print(builder.data_dir)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    path = done.stdout.strip().splitlines()[-1]
    features = Path(path) / "features.json"
    changed = features.read_text().replace("tensorflow_datasets.core.features.text_feature.Text", "evil.Text")
    assert "evil.Text" in changed
    features.write_text(changed)
    with pytest.raises(LensError, match=r"names the class 'evil.Text'"):
        units(Source("mine", "tfds", path), 7)


def test_a_column_that_is_named_is_the_one_that_is_read(tmp_path):
    path = tmp_path / "x.parquet"
    table = {"a": IMAGES[:3], "b": IMAGES[3:6], "text": ["x"] * 3, "alt_text": ["y"] * 3, "lang": ["de", None, "fr"]}
    pq.write_table(pa.table(table), path)
    only = lambda columns: everything(Source("mine", "parquet", str(path), columns=columns), 1000)
    (problem,) = only({})
    assert problem == Problem("x.parquet", "bad table", problem.detail)
    assert "say which by columns image" in problem.detail
    (problem,) = only({"image": "b"})
    assert "text and alt_text" in problem.detail
    found = only({"image": "b", "text": "alt_text", "language": "lang"})
    assert [item.data for item in found] == IMAGES[3:6]
    assert [item.texts for item in found] == [{"de": ("y",)}, {"en": ("y",)}, {"fr": ("y",)}]
    with pytest.raises(LensError, match=r"columns has 'imag'.*did you mean 'image'"):
        only({"imag": "b"})
    (problem,) = only({"image": "nothing"})
    assert "no column nothing; it has a, b, text" in problem.detail
    (problem,) = only({"image": "text"})
    assert "column text is of type string" in problem.detail


def test_a_source_is_a_file_or_a_pattern_too(tmp_path):
    for name in ("a-1", "a-2", "b-1", "[a]"):
        pq.write_table(pa.table({"image": IMAGES[:2]}), tmp_path / f"{name}.parquet")
    paths = lambda path: [unit.path for unit in units(Source("mine", "parquet", str(tmp_path / path)), 1000)]
    assert paths("a-*.parquet") == ["a-1.parquet", "a-2.parquet"]
    assert paths("[a].parquet") == ["[a].parquet"]
    assert len(paths("")) == 4
    for kind in ("parquet", "webdataset", "table", "folder", "lens", "tfds"):
        for path in (tmp_path / "none", tmp_path / "empty [folder]"):
            (tmp_path / "empty [folder]").mkdir(exist_ok=True)
            with pytest.raises(LensError, match=r"^[^\n]*(none|empty \[folder\])[^\n]*$"):
                units(Source("mine", kind, str(path)), 1000)


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    """Two thousand files in units of twenty: the second unit does not list the folder again."""
    root = tmp_path / "many"
    root.mkdir()
    for number in range(2_000):
        (root / f"{number:05d}.png").touch()
    source = Source("mine", "folder", str(root))
    found = units(source, 20)
    assert len(found) == 100

    def fail(*_):
        raise AssertionError("listed again")

    monkeypatch.setattr(folder_reader.folder.Scan, "_walk", fail)
    items = [item for unit in found for item in read(source, unit)]
    assert [item.key for item in items] == [f"{number:05d}.png" for number in range(2_000)]
    assert {item.reason for item in items} == {"no image"}
