"""Captions beside images and in tables: the right one, or a line that says what is wrong with it; never another one."""

import json
import os

import pytest
from PIL import Image

from lens_jax.data import writer
from lens_jax.data.config import DataConfig
from lens_jax.data.datasets import open_data
from lens_jax.data.index import load_index
from lens_jax.data.prepare import FolderConfig, prepare_folder
from lens_jax.encoders.text import check_prompts
from lens_jax.errors import LensError


def prepared(tmp_path, files: dict[str, str | bytes | None], **changes) -> tuple[dict, dict]:
    """(captions by image, details of what was left out by file) of a folder with such files; None is an image."""
    root = tmp_path / "in"
    for number, (name, content) in enumerate({"always.png": None, "always.txt": "there", **files}.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (16, 16), (number, 0, 0)).save(path, "PNG")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = FolderConfig(path=str(root), out=str(tmp_path / "out"), buckets=("16x16",), min_side=8, validation=0.0)
    index = load_index(prepare_folder(FolderConfig(**{**vars(config), **changes}), progress=False))
    captions = {record.source: dict(record.captions) for record in index.records("train")}
    for texts in captions.values():
        for lines in texts.values():
            check_prompts(lines)
    assert captions.pop("always.png") == {"en": ("there",)}
    return captions, {entry["file"]: f"{entry['reason']}: {entry['detail']}" for entry in index.failed}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.txt": "one\n\ntwo\r\nthree\rfour"}, ("one", "two", "three", "four")),
        ({"a.caption": "cap"}, ("cap",)),
        ({"a.TXT": "upper"}, ("upper",)),
        ({"a.png.txt": "whole"}, ("whole",)),
        ({"a.png.txt": "whole", "a.caption": "cap"}, ("whole",)),
        ({"a.txt": "tags", "a.caption": "sentence"}, ("tags",)),
        ({"a.txt": b"\xef\xbb\xbfmarked"}, ("marked",)),
        ({"a.txt": "in\u2028one\x85line\x0bof text"}, ("in\u2028one\x85line\x0bof text",)),
        ({"a.txt": "p\0i\0c\0"}, "bad caption: holds NUL"),
        ({"a.txt": "pic".encode("utf-16")}, "bad caption: a.txt is not UTF-8"),
        ({"a.txt": b"caf\xe9"}, "bad caption: a.txt is not UTF-8"),
        ({"a.txt": "\ufeff\u200b \n"}, "empty caption: "),
        ({"a.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, "bad caption: a.txt is a Git LFS"),
        ({"a.txt": "x" * 20_001}, "bad caption: over 20000 characters"),
        ({"a.txt": "x" * (1 << 20) + "y"}, "bad caption: a.txt is over 1048576 bytes"),
        ({"a.json": '{"caption": "x"}'}, "no caption: a.json lies beside it, which is not read"),
        ({}, "no caption: neither a .txt or .caption beside it nor a row"),
    ],
)  # fmt: skip
def test_caption_files(tmp_path, files, expected):
    captions, left_out = prepared(tmp_path, {"a.png": None, **files})
    if isinstance(expected, tuple):
        assert captions == {"a.png": {"en": expected}}
    else:
        assert captions == {}
        assert left_out["a.png"].startswith(expected)


def test_the_caption_file_that_counts_can_be_said(tmp_path):
    files = {"a.png": None, "a.txt": "tags", "a.caption": "sentence"}
    captions, _ = prepared(tmp_path, files, caption_files=(".caption", ".txt"))
    assert captions == {"a.png": {"en": ("sentence",)}}


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('file_name,text\na.png,"a cat, on a mat"\n', ("a cat, on a mat",)),
        ('file_name , text\r\na.png,6" nail\r\n', ('6" nail',)),
        (b"\xef\xbb\xbffile_name,text,language\na.png,one,\na.png,two,\n", ("one", "two")),
        ('file_name,text\na.png,"two\nlines"\n', ("two\nlines",)),
        ("file_name,text\na.png,a cat, on a mat, asleep\n", "2: bad row: 4 cells for 2 columns"),
        ("file_name,text,language\na.png,a cat\n", "2: bad row: 2 cells for 3 columns"),
        ('file_name,text\na.png,"a cat\nb.png,a dog\n', "3: bad row: not CSV: unexpected end of data"),
        ('file_name,text\na.png,"a" cat\n', "2: bad row: not CSV"),
        ("file_name;text\na.png;cat\n", "1: bad row: no row is used: no file_name; it has file_name;text"),
        ("image,text\na.png,cat\n", "1: bad row: no row is used: no file_name; it has image, text: say which with"),
        ("file_name,text,caption\na.png,x,y\n", "1: bad row: no row is used: both text and caption: say which"),
        (b"file_name,l\xe9gende,\"a\nb\"\na.png,x,y\n", "2: bad row: no row is used: none of text"),
        ("file_name,text,text\na.png,x,y\n", "1: bad row: no row is used: the header has a column twice"),
        ("file_name,text\na.png,a\0b\n", "2: bad row: text holds NUL"),
        (b"file_name,text\na.png,caf\xe9\n", "2: bad row: text holds what is not UTF-8"),
        ("file_name,text\na.png,x\n".encode("utf-16"), "1: bad row: the table is UTF-16"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "1: bad row: the table is a Git LFS pointer"),
    ],
)  # fmt: skip
def test_csv(tmp_path, table, problem):
    check(tmp_path, "metadata.csv", table, problem)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('{"file_name": "a.png", "captions": {"en": ["x", "y"]}}', ("x", "y")),
        ('\n{"file_name": "./b/../a.png", "caption": "x"}\r\n', ("x",)),
        (b'\xff\n{"file_name": "a.png", "text": "x"}', "1: bad row: not UTF-8"),
        ('{"file_name": "a.png", "text": "a\\u0000b"}', "1: bad row: text holds NUL"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "1: bad row: text holds what is not UTF-8"),
        ('{"file_name": "a.png", "text": "x", "text": "y"}', "1: bad row: a key is there twice"),
        ('{"file_name": "a.png", "prompt": "x"}', "1: bad row: none of text, caption, captions; it has file_name"),
        ('{"file_name": "a.png", "text": 7}', "1: bad row: text must be a text"),
        ('{"file_name": "a.png", "text": {"en": ["x", null]}}', "1: bad row: text must be a text"),
        ('{"file_name": "a.png", "text": "x", "language": "' + "e" * 33 + '"}', "1: bad row: a language"),
        ('[{"file_name": "a.png", "text": "x"}]', "1: bad row: not a JSON object"),
        ('{"file_name": "a.png",\n"text": "x"}', "1: bad row: not JSON"),
        ('{"file_name": "A.png", "text": "x"}', "1: missing image: no such file: 'A.png'"),
        ('{"file_name": "in\\\\a.png", "text": "x"}', "1: missing image"),
        ('{"text": "' + "x" * (17 << 20) + '"}', "1: bad row: over 16777216 bytes"),
    ],
    ids=range(15),
)  # fmt: skip
def test_json_lines(tmp_path, table, problem):
    check(tmp_path, "metadata.jsonl", table, problem)


def check(tmp_path, name, table, problem):
    captions, left_out = prepared(tmp_path, {"a.png": None, name: table})
    if isinstance(problem, tuple):
        assert captions == {"a.png": {"en": problem}}
    else:
        line, _, words = problem.partition(": ")
        assert left_out[f"{name}:{line}"].startswith(words)
        # A line that is not UTF-8 costs no other.
        assert captions == ({"a.png": {"en": ("x",)}} if table[:1] == b"\xff" and "jsonl" in name else {})


def test_a_column_that_is_no_language_and_captions_without_end(tmp_path, monkeypatch):
    """Both would fill memory and the header."""
    rows = [{"file_name": "a.png", "text": str(n)} for n in range(70)]
    rows += [{"file_name": "b.png", "text": "x", "language": str(n)} for n in range(300)]
    files = {"a.png": None, "b.png": None, "metadata.jsonl": "\n".join(map(json.dumps, rows))}
    _, left_out = prepared(tmp_path, files)
    assert left_out["a.png"].startswith("bad caption: over 20000 characters, or over 64 captions")
    assert left_out["b.png"] == "bad caption: over 256 languages"
    monkeypatch.setattr(writer, "MAX_LANGUAGES", 3)
    rows = [{"file_name": f"{n}.png", "text": "x", "language": f"id{n}"} for n in range(5)]
    files = {f"{n}.png": None for n in range(5)} | {"metadata.jsonl": "\n".join(map(json.dumps, rows))}
    with pytest.raises(LensError, match=r"over 3 languages: .*, ...; is something else called `language`"):
        prepared(tmp_path, files, overwrite=True)


def test_columns_of_other_peoples_tables(tmp_path):
    rows = [{"image": "a.png", "prompt": "one"}, {"image": "b.png", "prompt": "two", "text": "not this"}]
    files = {"a.png": None, "b.png": None, "metadata.jsonl": "\n".join(map(json.dumps, rows))}
    captions, left_out = prepared(tmp_path, files, caption_column="prompt", file_column="image")
    assert captions == {"a.png": {"en": ("one",)}, "b.png": {"en": ("two",)}}
    assert left_out == {}


def test_every_file_that_may_be_an_example_is_used_or_named(tmp_path):
    """Other endings and none, other tables, links, pipes; also where nothing else is there."""
    files = dict.fromkeys(("none", "a.dat", "b.heif", "c.jfif", "d.PNG", "e.v2.png"))
    files |= {f"{stem}.txt": stem for stem in ("none", "a", "b", "c", "d", "e.v2")}
    gif = b"GIF89a" + bytes(20)
    files |= {
        "anim": gif,
        "x.tga": b"tga",
        "train.jsonl": "{}",
        "captions.json": "{}",
        "00000.tar": b"tar",
        "y.gif": b"",
    }
    ignored = {"README.md": "# x", "LICENSE": "MIT", "a.npz": b"PK\3\4", ".hidden.png": gif, "Thumbs.db": bytes(8)}
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("in.png", "f.png"):
        Image.new("RGB", (16, 16)).save(outside / name)
    (outside / "in.txt").write_text("linked")
    root = tmp_path / "in"
    root.mkdir()
    (root / "album").symlink_to(outside)
    (root / "f.png").symlink_to(outside / "f.png")
    (root / "f.txt").symlink_to(outside / "in.txt")
    (root / "g.png").symlink_to(root / "g.png")
    (root / "h.png").symlink_to(root / "nowhere")
    (root / "circle").symlink_to(root)
    os.mkfifo(root / "p.png")
    Image.new("RGB", (16, 16)).save(root / "i.png")
    (root / "i.txt").symlink_to(outside / "in.txt")
    captions, left_out = prepared(tmp_path, {**files, **ignored})
    assert set(captions) == {"none", "a.dat", "b.heif", "c.jfif", "d.PNG", "e.v2.png"}
    assert {name: texts["en"] for name, texts in captions.items()}["e.v2.png"] == ("e.v2",)
    named = {"anim": "format not accepted: GIF;", "x.tga": "format not accepted: text; images are .png",
             "train.jsonl": "format not accepted: text; tables are metadata.jsonl", "captions.json": "format not",
             "00000.tar": "format not", "y.gif": "format not accepted: empty", "album": "linked folder: read with",
             "circle": "linked folder", "f.png": "outside the folder", "g.png": "cannot be", "h.png": "cannot be",
             "p.png": "cannot be read: no file", "i.png": "bad caption: i.txt is a link out of"}  # fmt: skip
    assert set(left_out) == set(named)
    for name, words in named.items():
        assert left_out[name].startswith(words), name
    captions, left_out = prepared(tmp_path, {}, follow_links=True, overwrite=True)
    assert {"album/in.png", "f.png", "i.png"} <= set(captions)
    assert left_out["circle"] == "linked folder: leads back to a folder that it lies in"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: (root / "album").symlink_to("/tmp"), "1 linked folder; album: read with --follow-links"),
        (lambda root: (root / "a.gif").write_bytes(b"GIF89a"), "1 format not accepted; a.gif: GIF; images are"),
        (lambda root: (root / "notes").write_text("x"), "no images in it; accepted are .png"),
    ],
)  # fmt: skip
def test_a_folder_of_nothing_says_what_lies_in_it(tmp_path, make, words):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(LensError, match=words):
        prepare_folder(FolderConfig(path=str(tmp_path / "in"), out=str(tmp_path / "out")), progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 64}, r"both give .*; leave some out: --ratios 1:2 9:16 3:4 1:1 4:3 3:2 2:1, or take a"),
        ({"licence": "\udcff"}, "licence"),
        ({"language": ""}, "language"),
        ({"language": "x" * 33}, "language"),
        ({"buckets": ("10000x10000",)}, "at most 80000000 pixels"),
        ({"buckets": ("16384x16",), "encoding": "webp"}, "sides of 16383 in webp"),
        ({"caption_files": ("txt",)}, "endings"),
        ({"file_column": ""}, "file_column"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_again_is_refused_before_the_work(tmp_path, changes, words):
    (tmp_path / "in").mkdir()
    with pytest.raises(LensError, match=words):
        prepare_folder(FolderConfig(path=str(tmp_path / "in"), out=str(tmp_path / "out"), **changes), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_not_utf8_and_a_language_of_validation_alone(tmp_path):
    captions = [{"file_name": f"{n}.png", "text": str(n), "language": "en" if n % 9 else f"l{n}"} for n in range(60)]
    files = {f"{n}.png": None for n in range(60)} | {"metadata.jsonl": "\n".join(map(json.dumps, captions))}
    prepared(tmp_path, files, validation=0.3)
    index = load_index(tmp_path / "out")
    assert set(index.captioned["validation"]) - set(index.captioned["train"])
    # Or validation would end at the first image that has captions in no other language.
    open_data(DataConfig(path=str(tmp_path / "out")), validation=True)
    assert set(index.captioned["validation"]) < set(index.languages)
    root = (tmp_path / "in").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    config = {"path": str(root), "buckets": ("16x16",), "min_side": 8}
    assert load_index(prepare_folder(FolderConfig(out=str(tmp_path / "again"), **config), progress=False)).streams
    with pytest.raises(LensError, match="UTF-8"):
        prepare_folder(FolderConfig(out=str(tmp_path / os.fsdecode(b"\xe9")), **config), progress=False)
