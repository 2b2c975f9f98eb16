"""A curated set: which records it has, that all that reads a data set reads it, and that damage is named."""

import json
import shutil

import numpy as np
import pytest

from lens_jax.data import images
from lens_jax.data.buckets import Bucket
from lens_jax.data.config import DataConfig
from lens_jax.data.curation import SCENE_KINDS, best, scene_kind, shares
from lens_jax.data.datasets import open_data
from lens_jax.data.index import NAME, load_index
from lens_jax.data.pipeline import batches
from lens_jax.data.prepare_curated import CuratedConfig, prepare_curated
from lens_jax.data.records import Record, encode
from lens_jax.data.writer import DataWriter
from lens_jax.errors import LensError

BUCKETS = Bucket(16, 16), Bucket(16, 24)
KINDS = ("portraits", "styles")


def write(folder, meta, count=40):
    """A data set of small shards; `meta` says what each of its train records knows of itself."""
    with DataWriter(folder, BUCKETS, shard_bytes=600) as writer:
        for i in range(count + 2):
            split, bucket = ("train" if i < count else "validation"), BUCKETS[i % 3 == 0]
            pixels = np.full((bucket.height, bucket.width, 3), i, np.uint8)
            record = Record(
                images.encode_image(pixels, "png"), {"en": (f"number {i}",)}, bucket.height, bucket.width,
                source=f"[{i}].png", meta=meta(i),
            )  # fmt: skip
            writer.write(split, bucket, 0, encode(record), ["en"])
        return writer.finish(source="folder", config={}, licence="CC0", languages=("en",), holdout_languages=())


def known(i):
    return {"kind": ("portraits", "styles", "other")[i % 3], "aesthetic": float(i % 10), "sharp": i / 2}


def of(path):
    """The numbers of the records of a data set."""
    return sorted(int(record.source[1:-5]) for record in load_index(path).records("train"))


def curate(whole, out, **options):
    options = {"images": 8, "kinds": KINDS, "scores": ("aesthetic",), **options}
    return prepare_curated(CuratedConfig(str(whole), str(out), **options), progress=False)


def test_the_best_of_each_kind_without_a_copy(tmp_path):
    whole = write(tmp_path / "whole", known)
    out = curate(tmp_path / "whole", tmp_path / "curated")
    scores = lambda numbers, kind: sorted(known(i)["aesthetic"] for i in numbers if known(i)["kind"] == kind)
    chosen = of(out)
    for kind in KINDS:
        assert scores(chosen, kind) == scores(range(40), kind)[-4:]
    assert len(chosen) == 8
    assert not list(out.rglob("*.array_record"))
    index = load_index(out)
    assert index.counts("validation") == (0, 0)
    assert index.check() == len({(s.name, shard.name) for s in index.streams for shard in index.shards(s)})
    manifest = json.loads((out / "curated.json").read_text())
    assert manifest["fingerprint"] == whole.fingerprint
    assert {kind: values["chosen"] for kind, values in manifest["kinds"].items()} == {"portraits": 4, "styles": 4}
    assert manifest["left_out"] == {"of other kinds": 13}
    assert manifest["kinds"]["styles"]["scores"]["aesthetic"]["least"] == scores(chosen, "styles")[0]
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert sorted(int(line["prompt"].split()[1]) for line in lines) == chosen
    assert all(line["category"] == known(int(line["prompt"].split()[1]))["kind"] for line in lines)
    # Again, elsewhere: the same. Another seed: others among equals. All of it: another set than the whole.
    assert load_index(curate(tmp_path / "whole", tmp_path / "again")).fingerprint == index.fingerprint
    assert of(curate(tmp_path / "whole", tmp_path / "any", scores=())) != of(
        curate(tmp_path / "whole", tmp_path / "any2", scores=(), seed=1)
    )


def test_batches_are_of_it_alone(tmp_path):
    """Each of its images once an epoch, as of any data set, and the set may be moved with what it is of."""
    write(tmp_path / "data" / "whole", known)
    curate(tmp_path / "data" / "whole", tmp_path / "data" / "curated", images=12)
    (tmp_path / "data").rename(tmp_path / "moved")
    path = tmp_path / "moved" / "curated"
    data = open_data(DataConfig(path=str(path), batch_size=2, threads=0, prefetch=0))
    seen = {}
    for batch in batches(data, count=40):
        seen.setdefault(batch["bucket"], []).extend(batch["pixels"][:, 0, 0, 0].tolist())
    counts = dict(zip(load_index(path).buckets, load_index(path).counts("train")))
    epoch = [i for bucket, shown in seen.items() for i in shown[: counts[Bucket(*bucket)]]]
    assert sorted(epoch) == of(path)


def test_kinds_and_scores_of_a_table(tmp_path):
    write(tmp_path / "whole", lambda i: {})
    rows = [{"file_name": f"[{i}].png", "kind": KINDS[i % 2], "a": -i, "b": i % 4} for i in range(40)]
    lines, cells = tmp_path / "t.jsonl", tmp_path / "t.csv"
    lines.write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n")
    cells.write_text("file_name,kind,a,b\n" + "".join(f"{','.join(map(str, row.values()))}\n" for row in rows))
    found = [
        of(curate(tmp_path / "whole", tmp_path / f"c{i}", table=str(table), scores=("a",), images=6))
        for i, table in enumerate((lines, cells))
    ]
    assert found == [[0, 1, 2, 3, 4, 5]] * 2
    # Ranks of both: b is 2 or 3 at best, and of those the smallest numbers are best by a.
    both = curate(tmp_path / "whole", tmp_path / "both", table=str(lines), scores=("a", "b"), images=2)
    assert of(both) == [2, 3]
    least = curate(tmp_path / "whole", tmp_path / "l", table=str(lines), scores=("a",), least=(-5,), images=0)
    assert of(least) == [0, 1, 2, 3, 4, 5]


def test_shares_come_out_even_or_say_why():
    assert shares(8, {"a": 9, "b": 9, "c": 9}, False) == {"a": 3, "b": 3, "c": 2}
    assert shares(0, {"a": 9, "b": 4}, False) == {"a": 4, "b": 4}
    assert shares(20, {"a": 9, "b": 4, "c": 30}, True) == {"a": 8, "b": 4, "c": 8}
    with pytest.raises(LensError, match=r"too few of some kinds: 'b' has 4 of 7; .*--images 0 .*--fill"):
        shares(20, {"a": 9, "b": 4, "c": 30}, False)
    with pytest.raises(LensError, match="there are 13 in all"):
        shares(20, {"a": 9, "b": 4}, True)
    with pytest.raises(LensError, match="fewer than the 2 kinds; the rarest, 'b', has 4"):
        shares(1, {"a": 9, "b": 4}, False)
    ties = np.array([3, 1, 2, 0], np.uint64)
    np.testing.assert_array_equal(best(np.array([[1.0], [2], [2], [0]]), 2, ties), [1, 2])
    np.testing.assert_array_equal(best(np.zeros((4, 0)), 2, ties), [1, 3])


def test_the_pictogram_world_has_kinds_of_its_own(pictograms, tmp_path):
    config = CuratedConfig(str(pictograms), str(tmp_path / "c"), images=0, kinds=("one", "counting", "places"))
    records = list(load_index(prepare_curated(config, progress=False)).records("train"))
    kinds = [scene_kind(record.meta) for record in records]
    assert {kinds.count(kind) for kind in config.kinds} == {len(records) // 3}
    assert scene_kind({"kind": "scene", "concepts": ["a"], "word": "CAT"}) == "text"
    assert scene_kind({"kind": "scene", "concepts": ["a", "b"], "relation": "above"}) == "relations"
    with pytest.raises(LensError, match=r"no record of the kinds relations, text \(.*of other kinds"):
        prepare_curated(CuratedConfig(str(pictograms), str(tmp_path / "d"), images=0), progress=False)
    assert len(SCENE_KINDS) == 5


@pytest.mark.parametrize(
    ("meta", "options", "words"),
    [
        (lambda i: {"aesthetic": 1.0}, {}, r"\[1\].png .*: no kind under 'kind'; it has aesthetic"),
        (lambda i: {"kind": "styles"}, {}, r"no score 'aesthetic'; it has kind"),
        (lambda i: {**known(i), "aesthetic": float("nan")}, {}, "its 'aesthetic' is nan, no finite number"),
        (lambda i: {**known(i), "aesthetic": [1]}, {}, r"its 'aesthetic' is \[1\], no finite number"),
        (lambda i: {"kind": "styles"}, {"skip_missing": True}, "no record of the kinds portraits, styles .40 without"),
        (known, {"scores": ("a", "a")}, "scores a a: one is given twice"),
        (known, {"least": (1.0, 2.0)}, "there are 1 scores"),
        (known, {"kinds": ("portraits", "nothing")}, "no record of the kinds nothing .* --kinds"),
        (known, {"images": 1000}, "'portraits' has 14 of 500"),
        (known, {"table": "no.csv"}, "no.csv: cannot be read: No such file"),
    ],
)
def test_what_is_missing_is_named(tmp_path, meta, options, words):
    write(tmp_path / "whole", meta)
    with pytest.raises(LensError, match=words):
        curate(tmp_path / "whole", tmp_path / "curated", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a table without rows"),
        ("{", "t.jsonl:1: not JSON"),
        ("[1]\n", "t.jsonl:1: not a JSON object"),
        ('\n{"file": "x"}\n', r"t.jsonl:2: no text in the column 'file_name'; it has file"),
        ('{"file_name": "[0].png"}\n' * 2, r"t.jsonl:2: '\[0\].png' is there a second time"),
        ('{"file_name": "x"}\n', r"t.jsonl has no row with file_name '\["),
        (b"\xff\xfe{", "not UTF-8"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, words):
    write(tmp_path / "whole", known, 3)
    table = tmp_path / "t.jsonl"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LensError, match=words):
        curate(tmp_path / "whole", tmp_path / "c", table=str(table))


def test_a_set_that_is_not_of_what_is_there_any_more(tmp_path):
    write(tmp_path / "whole", known)
    out = curate(tmp_path / "whole", tmp_path / "curated")
    with pytest.raises(LensError, match=r"a subset itself; give .*whole"):
        curate(out, tmp_path / "again")
    with pytest.raises(LensError, match="lies inside the data set"):
        curate(tmp_path / "whole", tmp_path / "whole" / "in")
    header = json.loads((out / NAME).read_text())
    stream = load_index(out).streams[0]
    rows = out / f"{stream.name}.rows"
    for damage, words in (
        (rows.read_bytes()[:-1], "bytes, the index says"),
        (rows.read_bytes()[:-1] + b"\xff", "its sha256 is another"),
    ):
        shutil.copytree(out, tmp_path / "damaged")
        (tmp_path / "damaged" / rows.name).write_bytes(damage)
        with pytest.raises(LensError, match=words):
            list(load_index(tmp_path / "damaged").records("train"))
        shutil.rmtree(tmp_path / "damaged")
    for subset, words in (
        ({"path": "../curated"}, "which is a subset itself"),
        ({"path": "no\0where"}, "what it is of cannot be read: no data set"),
        ({"path": 3}, "path must be a text"),
        ({"rows": {}}, "must be a text, found nothing"),
        ({"fingerprint": "0" * 16}, "another state of"),
    ):
        (out / NAME).write_text(json.dumps({**header, "subset": {**header["subset"], **subset}}))
        with pytest.raises(LensError, match=words):
            load_index(out)
    (out / NAME).write_text(json.dumps(header))
    shutil.rmtree(tmp_path / "whole")
    write(tmp_path / "whole", known, 39)
    with pytest.raises(LensError, match=r"another state of .*whole"):
        load_index(out)
