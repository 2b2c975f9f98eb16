"""Sources that are damaged or mean harm: everything is counted with its reason, and nothing hangs."""

import hashlib
import io
import os
import signal
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import Item, Problem, read, tar, units
from lens_jax.errors import LensError

pa = pytest.importorskip("pyarrow", reason="needs the extra data")
import pyarrow.parquet as pq  # noqa: E402

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"


@pytest.fixture(autouse=True)
def deadline():
    """No test of this file takes a minute of processor time unless it hangs."""

    def late(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, 60)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def image(number: int = 0) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = image()


def items(path: Path, kind: str, unit_rows: int = 1000, **fields) -> list[Item | Problem]:
    source = Source("mine", kind, str(path), **fields)
    return [item for unit in units(source, unit_rows) for item in read(source, unit)]


def reasons(found) -> list[str]:
    return [item.reason if isinstance(item, Problem) else "ok" for item in found]


def member(name: str, data: bytes = IMAGE, **fields) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(info, io.BytesIO(data))
        return buffer.getvalue()[: file.offset]


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with these bytes as they are, and its right checksum."""
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[257:265], block[148:156] = b"ustar\00000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)


def test_a_tar_that_ends_anywhere_gives_what_is_whole_and_one_problem(tmp_path):
    whole = (
        b"".join(member(f"{number}.png", image(number)) + member(f"{number}.txt", b"x") for number in range(4)) + END
    )
    path = tmp_path / "a.tar"
    size = len(member("0.png"))
    for cut in [*range(0, len(whole) - 1024, 333), len(whole) - 1024, size, size + 512]:
        path.write_bytes(whole[:cut])
        found = items(path, "webdataset")
        images = [item for item in found if isinstance(item, Item)]
        expected = [number for number in range(4) if cut >= whole.index(image(number)) + len(image(number))]
        assert [item.data for item in images] == [image(number) for number in expected], cut
        assert len(found) == len(images) + 1, cut
        assert "truncated" in reasons(found), cut
        assert items(path, "webdataset", 1) == found
    path.write_bytes(whole)
    assert reasons(items(path, "webdataset")) == ["ok"] * 4
    path.write_bytes(member("a.png") + member(".hidden.png")[:560])
    assert reasons(items(path, "webdataset")) == ["ok", "truncated"]


def test_members_that_lead_elsewhere_are_problems(tmp_path):
    path = tmp_path / "a.tar"
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    parts = {
        member("good.png"): "ok",
        member("../up.png"): "outside the folder",
        member("a/../../b.png"): "outside the folder",
        member("/etc/absolute.png"): "outside the folder",
        member("link.png", b"", **link): "link",
        member("hard.png", b"", type=tarfile.LNKTYPE, linkname="good.png"): "link",
        member("pipe.png", b"", type=tarfile.FIFOTYPE): "no file",
        member("device.png", b"", type=tarfile.CHRTYPE): "no file",
        member("strange.png", type=b"Z"): "no file",
        member("folder.png/", b"", type=tarfile.DIRTYPE): None,
        member("good.png", image(1)): "duplicate key",
        member("empty.png", b""): "no image",
        member("text.txt", b"alone"): "no image",
        member("two.a.png") + member("two.b.png"): "several images",
        member("one.png", image(2)) + member("one.mask.png"): "ok",
        member(".hidden.png"): None,
        member("last [ü].png", image(3)): "ok",
    }
    path.write_bytes(b"".join(parts) + END)
    found = items(path, "webdataset")
    assert reasons(found) == [reason for reason in parts.values() if reason]
    assert [item.data for item in found if isinstance(item, Item)][-1] == image(3)
    assert all(item.key.startswith("a.tar/") for item in found)


def test_sparse_files_of_both_kinds_are_problems_and_what_follows_is_read(tmp_path):
    path = tmp_path / "a.tar"
    record = b"22 GNU.sparse.major=1\n"
    pax = header(b"x", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0")
    old = bytearray(header(b"old.png", b"%011o\0" % 512, b"S"))
    old[482] = 1  # a further block of the map follows
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    more = bytearray(512)
    path.write_bytes(pax + member("new.png") + bytes(old) + bytes(more) + bytes(512) + member("good.png") + END)
    assert reasons(items(path, "webdataset")) == ["sparse", "sparse", "ok"]


def hostile_headers() -> dict[str, tuple[bytes, list[str]]]:
    """What sets `tarfile` going in circles, or asks for memory that is not there."""
    base256 = lambda value: (
        b"\xff" + (value + (1 << 88)).to_bytes(11, "big") if value < 0 else b"\x80" + value.to_bytes(11, "big")
    )
    good = member("good.png")
    pax = lambda records: (
        header(b"x", b"%011o\0" % len(records), b"x") + records.ljust(-(-len(records) // 512) * 512, b"\0")
    )
    return {
        "negative size": (good + header(b"a.png", base256(-1024)) + good, ["ok", "corrupt data"]),
        "negative name": (good + header(b"a.png", base256(-512), b"L") + good, ["ok", "corrupt data"]),
        "exabytes": (good + header(b"a.png", base256(1 << 70)), ["ok", "truncated"]),
        "a name of 8 GiB": (good + header(b"a.png", b"77777777777\0", b"L") + good, ["ok", "truncated"]),
        "a name of 1 MiB": (good + header(b"a", b"%011o\0" % (1 << 20), b"x") + bytes(1 << 20), ["ok", "corrupt data"]),
        "negative size in pax": (good + pax(b"12 size=-99\n") + good + END, ["ok", "corrupt data"]),
        "digits in pax": (good + pax(b"9" * 60_000) + member("b.png") + END, ["ok", "ok"]),
        "a size of many digits": (good + pax(b"5009 size=" + b"9" * 4998 + b"\n") + good + END, ["ok", "corrupt data"]),
        "names of names": (good + header(b"a", b"%011o\0" % 1, b"L") * 1 + b"z".ljust(512, b"\0") + END, ["ok"]),
        "wrong checksum": (good + b"b.png".ljust(512, b"\1") + good, ["ok", "corrupt data"]),
        "not octal": (good + header(b"b.png", b"9z9z9z9z9z9\0") + good, ["ok", "corrupt data"]),
        "zeros in between": (good + END * 20 + member("b.png") + END, ["ok", "ok"]),
        "a pointer": (LFS, ["format not accepted"]),
        "compressed": (b"\x1f\x8b\x08" + bytes(600), ["format not accepted"]),
        "empty": (b"", ["truncated"]),
        "only zeros": (bytes(10_240), []),
    }


@pytest.mark.parametrize("case", hostile_headers())
def test_headers_that_mean_harm(tmp_path, case):
    data, expected = hostile_headers()[case]
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        assert reasons(items(path, "webdataset")) == expected
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_hole_of_a_terabyte_is_no_tar_of_a_terabyte(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(member("good.png"))
    os.truncate(path, 1 << 40)
    source = Source("mine", "webdataset", str(path))
    found = units(source, 1_000_000)
    assert 1 < len(found) <= 1 << 16
    assert reasons(read(source, found[0])) == ["ok"]
    assert list(read(source, found[-1])) == []
    monkeypatch.setattr(tar, "MAX_MEMBERS", 3)
    path.write_bytes(b"".join(member(f"{n}.png") for n in range(9)) + END)
    assert reasons(items(path, "webdataset")) == ["ok"] * 3 + ["too many files"]


def test_mutated_tars(tmp_path):
    """None raises or hangs, and what comes out whole is what went in."""
    rng = np.random.default_rng(0)
    whole = b"".join(member(f"{number}.png", image(number)) for number in range(4)) + END
    path, source = tmp_path / "a.tar", Source("mine", "webdataset", str(tmp_path / "a.tar"))
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        if rng.random() < 0.3:
            start = int(rng.integers(len(data)))
            data[start : start + int(rng.integers(1, 700))] = b""
        path.write_bytes(data)
        found = [item for unit in units(source, 1000) for item in read(source, unit)]
        assert len(found) <= 12


def test_rows_of_parquet_are_all_counted(tmp_path):
    path = tmp_path / "a.parquet"
    images = [IMAGE, None, b"", IMAGE, IMAGE, IMAGE]
    texts = ["x", "y", "z", "x" * 1_000_000, None, "a\0b"]
    pq.write_table(pa.table({"image": images, "text": texts}), path)
    found = items(path, "parquet", unit_rows=2)
    assert reasons(found) == ["ok", "no image", "no image", "ok", "ok", "ok"]
    assert [item.texts for item in found if isinstance(item, Item)] == [{"en": ("x",)}, {}, {}, {}]
    found = items(path, "parquet", caption="keep")
    assert reasons(found) == ["ok", "no image", "no image", "bad caption", "no caption", "bad caption"]


def test_a_checksum_that_is_asked_for_is_compared(tmp_path):
    sums = [hashlib.sha256(image(number)).hexdigest() for number in (0, 1, 2)]
    rows = {
        "key": ["a", "b", "c"],
        "image": [image(0), image(1), image(1)],
        "sha256": [sums[0], sums[1].upper(), sums[2]],
    }
    pq.write_table(pa.table(rows), tmp_path / "0.parquet")
    (tmp_path / "0").mkdir()
    for key, data in zip(rows["key"], rows["image"]):
        (tmp_path / "0" / f"{key}.png").write_bytes(data)
    parts = [
        member(f"{key}.png", data) + member(f"{key}.json", b'{"sha256": "%s"}' % sum.encode())
        for key, data, sum in zip(*rows.values())
    ]
    (tmp_path / "1.tar").write_bytes(b"".join(parts) + END)
    for kind in ("parquet", "table", "webdataset"):
        assert reasons(items(tmp_path, kind, columns={"sha256": "sha256"})) == ["ok", "ok", "checksum"], kind
        assert reasons(items(tmp_path, kind)) == ["ok"] * 3


def test_parquet_that_is_none_or_not_of_images(tmp_path):
    good = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [IMAGE] * 3}), good)
    whole = good.read_bytes()
    for number, data in enumerate((b"", LFS, whole[:100], whole[:-4] + b"XXXX", b"PAR1" + b"\xff" * 50 + b"PAR1")):
        (tmp_path / f"b{number}.parquet").write_bytes(data)
    pq.write_table(pa.table({"pixels": [[1, 2], [3]]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"image": ["text", "text"]}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "e.parquet")
    found = items(tmp_path, "parquet")
    assert reasons(found) == ["ok"] * 3 + ["bad table"] * 7
    details = [item.detail for item in found if isinstance(item, Problem)]
    assert "Git LFS pointer" in details[1]
    assert "no columns of bytes; it has pixels: say which by columns image" in details[5]
    assert all(item.detail and "\n" not in item.detail for item in found if isinstance(item, Problem))


def test_rows_that_name_files_stay_inside_the_folder(tmp_path):
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a [1].png").write_bytes(IMAGE)
    (tmp_path / "secret.png").write_bytes(IMAGE)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(root / "pipe.png")
    paths = [
        "images/a [1].png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "none.png",
        "images",
        "a\0b",
        None,
    ]
    rows = [{"bytes": None, "path": path} for path in paths]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), root / "a.parquet")
    assert reasons(items(root, "parquet")) == [
        "ok", "outside the folder", "outside the folder", "outside the folder", "missing image", "cannot be read",
        "missing image", "no image",
    ]  # fmt: skip


def test_mutated_parquet(tmp_path):
    """Whatever is changed, each of the rows that the file still claims is an item or a problem, or all are one."""
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [image(number) for number in range(12)], "text": [f"text {n}" for n in range(12)]})
    pq.write_table(table, path, row_group_size=3)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = 0
    for _ in range(60):
        data = bytearray(whole)
        place = int(rng.integers(4, len(data) // 2))  # in the pages; the footer is for the tests above
        data[place : place + 8] = rng.bytes(8)
        path.write_bytes(data)
        found = items(path, "parquet", unit_rows=5)
        assert len(found) == 12 or reasons(found) == ["bad table"]
        damaged += "corrupt data" in reasons(found)
    assert damaged


def test_tables_and_their_images_are_joined_and_what_has_no_other_half_is_named(tmp_path):
    keys = ["a", "b", "b", None, "c", 7]
    rows = pa.table({"key": pa.array([None if key is None else str(key) for key in keys]), "text": ["x"] * 6})
    pq.write_table(rows, tmp_path / "0.parquet")
    (tmp_path / "0").mkdir()
    for name in ("a.png", "b.png", "7.jpg", "over.png", "a.txt", ".hidden.png"):
        (tmp_path / "0" / name).write_bytes(IMAGE)
    (tmp_path / "0" / "c.png").symlink_to("/etc/passwd")
    pq.write_table(pa.table({"key": ["a"], "text": ["x"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"name": ["a"], "text": ["x"]}), tmp_path / "2.parquet")
    pq.write_table(pa.table({"key": ["a", "b"], "text": ["x"] * 2}), tmp_path / "3.parquet")
    (tmp_path / "3.tar").write_bytes(member("a.png") + member("b.png")[:560])
    found = items(tmp_path, "table")
    assert reasons(found) == [
        "ok", "ok", "duplicate key", "bad row", "missing image", "ok", "no row",
        "bad table", "bad table", "ok", "truncated",
    ]  # fmt: skip
    assert items(tmp_path, "table", unit_rows=2) == found
    assert "neither 1.tar nor the folder 1" in found[7].detail
    assert "say which by columns key" in found[8].detail


def test_a_folder_of_everything(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(IMAGE)
    (root / "b.png").write_bytes(b"")
    (root / "c.png").write_bytes(LFS)
    (root / "d.txt").write_bytes(b"\xff\xfe")
    (root / "d.png").write_bytes(IMAGE)
    (root / "e.png").symlink_to("/etc/passwd")
    os.mkfifo(root / "f.png")
    with open(os.fsencode(root) + b"/g\xff.png", "wb") as file:
        file.write(IMAGE)
    with open(root / "huge.png", "wb") as file:
        file.truncate(1 << 40)
    (root / "metadata.jsonl").write_text(
        '{"file_name": "../x.png", "text": "x"}\n{"file_name": "a.png", "text": "\\ud800"}\n'
    )
    for name, data in (("damaged", b"PAR1" + bytes(90) + b"PAR1"), ("pointer", LFS)):
        (root / name).mkdir()
        (root / name / "metadata.parquet").write_bytes(data)
    pq.write_table(pa.table({"file_name": ["b.png", None], "text": ["x", "y"]}), root / "metadata.parquet")
    found = items(root, "folder")
    by_key = {item.key: reason for item, reason in zip(found, reasons(found))}
    assert by_key == {
        "metadata.jsonl:1": "outside the folder",
        "metadata.jsonl:2": "bad row",
        "metadata.parquet:2": "bad row",
        "damaged/metadata.parquet:1": "bad row",
        "pointer/metadata.parquet:1": "bad row",
        "a.png": "ok",
        "b.png": "no image",
        "c.png": "ok",  # that it is no image is for decoding to say, which names the pointer
        "d.png": "ok",
        "e.png": "outside the folder",
        "f.png": "cannot be read",
        "g\\xff.png": "ok",
        "huge.png": "too large",
    }
    kept = {
        item.key: reason for item, reason in zip(*(lambda x: (x, reasons(x)))(items(root, "folder", caption="keep")))
    }
    assert (kept["a.png"], kept["d.png"]) == ("no caption", "bad caption")


def test_a_damaged_data_set_of_our_own_is_counted(tmp_path):
    from lens_jax.data.buckets import Bucket
    from lens_jax.data.records import Record, encode
    from lens_jax.data.writer import DataWriter

    bucket = Bucket(4, 4)
    with DataWriter(tmp_path / "data", [bucket], 1) as writer:
        for number in range(5):
            writer.write("train", bucket, 0, encode(Record(image(number), {"en": ("x",)}, 4, 4)), ["en"])
        writer.finish(source="made up", config={}, licence="CC0", languages=["en"], holdout_languages=[])
    shards = sorted((tmp_path / "data").rglob("*.array_record"))
    shards[1].unlink()
    shards[3].write_bytes(bytes(shards[3].stat().st_size))
    assert reasons(items(tmp_path / "data", "lens")) == ["ok", "corrupt data", "ok", "corrupt data", "ok"]
    (tmp_path / "data" / "index.json").write_text("{")
    with pytest.raises(LensError, match="cannot be read as JSON"):
        items(tmp_path / "data", "lens")


def test_struct_of_a_zip_is_no_tar(tmp_path):
    """Endings lie: what the file is, is said."""
    (tmp_path / "a.tar").write_bytes(b"PK\3\4" + struct.pack("<IIII", 1, 2, 3, 4) + bytes(600))
    (problem,) = items(tmp_path / "a.tar", "webdataset")
    assert problem == Problem("a.tar", "format not accepted", "a ZIP archive; an uncompressed tar is needed")
