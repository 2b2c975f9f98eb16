"""Preparing data sets: what is written is complete and true, and what cannot be used is named."""

import csv
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lens_jax.data import caption_length, captions, phrases, prepare_scenes, scene_sampler, scenes
from lens_jax.data.buckets import Bucket
from lens_jax.data.index import NAME, load_index
from lens_jax.data.prepare import FolderConfig, prepare_folder
from lens_jax.data.prepare_scenes import OpenMojiConfig, prepare_openmoji
from lens_jax.data.records import decode_image
from lens_jax.data.sources import folder, openmoji
from lens_jax.errors import LensError


def tiny(path, **changes) -> OpenMojiConfig:
    small = {"concepts": 8, "size": 48, "scenes": 200, "copies": 1, "validation": 9, "world": "all"}
    languages = {"languages": phrases.LANGUAGES, "holdout_languages": ("it", "ko")}
    return OpenMojiConfig(**{"out": str(path), **small, **languages, **changes})


@pytest.fixture(scope="module")
def pictograms(tmp_path_factory):
    return prepare_openmoji(tiny(tmp_path_factory.mktemp("data") / "openmoji"), progress=False)


def test_all_concepts_exist_with_distinct_names():
    concepts = openmoji.load_concepts(128)
    assert len({concept.id for concept in concepts}) == 128
    for language in openmoji.LANGUAGES:
        names = [concept.names[language] for concept in concepts]
        assert len(set(names)) == 128, language
        assert not any(set(name) & set("_:") or name != name.strip() for name in names)
    sprites = openmoji.load_sprites(concepts, 32)
    for name, sprite in sprites.items():
        assert sprite.size == (32, 32)
        left, top, right, bottom = sprite.getbbox()
        assert max(right - left, bottom - top) >= 31, name
    flat = np.stack([np.asarray(scenes_on_white(sprite), np.float32).ravel() for sprite in sprites.values()])
    distance = np.sqrt(((flat[:, None] - flat[None]) ** 2).mean(-1)) + 1000 * np.eye(128)
    assert distance.min() > 30  # of 255: no two look nearly alike


def scenes_on_white(sprite):
    white = Image.new("RGBA", sprite.size, "white")
    return Image.alpha_composite(white, sprite).convert("RGB").resize((16, 16), Image.Resampling.BOX)


def test_captions_are_true(pictograms):
    """Of the whole world: what the English caption says is what the meta says, and what is painted."""
    manifest = load_index(pictograms)
    names = {entry["id"]: entry["names"]["en"] for entry in json.loads((pictograms / "concepts.json").read_text())}
    assert sum(manifest.counts("train")) == 200 + 8 * 3
    assert manifest.languages == tuple(name for name in phrases.LANGUAGES if name not in ("it", "ko"))
    references, kinds, english = set(), set(), phrases.PHRASES["en"]
    for record in manifest.records("train"):
        pixels, meta = decode_image(record), record.meta
        height, width = pixels.shape[:2]
        assert set(record.captions) == set(manifest.languages)
        (text,) = record.captions["en"]
        concepts = meta["concepts"]
        if meta["kind"] == "reference":
            references.add((concepts[0], height, width))
            assert text == names[concepts[0]]
        covered = np.zeros((height, width), bool)
        centres = []
        for concept, position, size, (left, top, right, bottom) in zip(
            concepts, meta["positions"], meta["sizes"], meta["boxes"]
        ):
            x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
            centres.append((x, y))
            assert names[concept] in text
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            covered[top:bottom, left:right] = True
            if position:
                assert is_at(position, x, y), position
            if position or size:
                said = [getattr(english, what) for what in (size, position) if what]
                assert f"{names[concept]} ({', '.join(said)})" in text
            if size:
                assert (right - left < 26) == (size == "small")
        if relation := meta["relation"]:
            (x, y), (other_x, other_y) = centres
            assert {"left_of": x < other_x, "right_of": x > other_x, "above": y < other_y, "below": y > other_y}[
                relation
            ]
            assert getattr(english, relation).replace("{x}", names[concepts[1]]) in text
        elif len(concepts) > 1 and len(set(concepts)) == 1:
            times = {2: "two times", 3: "three times", 4: "four times"}[len(concepts)]
            assert text.startswith(f"{names[concepts[0]]} ({times})")
        if "word" in meta:
            left, top, right, bottom = meta["word_box"]
            assert f'the word "{meta["word"]}"' in text
            ink = (pixels[top:bottom, left:right] < 60).all(-1)
            assert 0.01 < ink.mean() < 0.6
            covered[top:bottom, left:right] = True
        kinds.add((len(concepts), len(set(concepts)), meta["relation"] != "", "word" in meta))
        # Outside the boxes there is only the background that the caption names.
        assert (pixels[~covered] == scenes.COLOURS[meta["background"]]).all()
        assert (pixels[covered] != scenes.COLOURS[meta["background"]]).any()
    assert len(references) == 8 * 3
    assert len(kinds) == 10
    train = {record.captions["en"] for record in manifest.records("train")}
    for record in manifest.records("validation"):
        assert record.captions["en"] not in train
        assert set(record.captions) == set(phrases.LANGUAGES)


def is_at(position: str, x: float, y: float) -> bool:
    """Whether a centre in fractions of the image is where the caption says."""
    sides = {"left": x < 0.45, "right": x > 0.55, "top": y < 0.45, "bottom": y > 0.55}
    if position == "centre":
        return abs(x - 0.5) < 0.2 and abs(y - 0.5) < 0.2
    return all(sides[side] for side in position.split("_"))


def test_three_densities_of_the_same_truth_and_sentences_of_people():
    concepts = openmoji.load_concepts(64)
    fox, house = (next(c for c in concepts if c.id == name) for name in ("fox", "house"))
    box, square = (0, 0, 20, 20), Bucket(64, 64)
    placed = lambda concept, position="", size="": scenes.Placed(concept, position, box, size)
    word = scenes.Word("LENS", "roboto", "bottom", box)
    related = scenes.Scene(square, "blue", (placed(fox), placed(house)), "left_of")
    three = scenes.Scene(square, "pink", (placed(fox),) * 3)
    small = scenes.Scene(square, "grey", (placed(house, "top", "small"),))
    written = scenes.Scene(square, "white", (placed(fox),), word=word)
    for scene, brief, mixed, dense, natural in (
        (related, "fox", "fox, house", "fox, to the left of house, light blue background",
         "a fox to the left of a house on a light blue background"),
        (three, "fox", "fox (three times)", "fox (three times), pink background", "three foxes on a pink background"),
        (small, "house", "house", "house (small, at the top), grey background",
         "a small house at the top on a grey background"),
        (written, "fox", 'fox, the word "LENS"', 'fox, the word "LENS" (at the bottom), white background',
         'a fox and the word "LENS" at the bottom on a white background'),
    ):  # fmt: skip
        assert [captions.caption(scene, "en", density) for density in captions.DENSITIES] == [brief, mixed, dense]
        assert captions.natural(scene) == natural
    assert captions.caption(related, "de") == "Fuchs, links von Haus, hellblauer Hintergrund"
    assert captions.caption(written, "ja") == "キツネ、「LENS」という文字（下に）、白い背景"


def test_held_out_combinations_are_not_trained_on(tmp_path):
    data = prepare_openmoji(tiny(tmp_path / "data", scenes=150, hold_out=True, densities=(1, 1, 2)), progress=False)
    rng, concepts = np.random.default_rng(0), openmoji.load_concepts(8)
    drawn = [scene_sampler.sample_scene(rng, concepts, Bucket(64, 64), "all") for _ in range(2000)]
    out = [scene for scene in drawn if scene_sampler.held_out(scene)]
    assert 0.04 < len(out) / len(drawn) < 0.25
    pairs = {tuple(sorted(p.concept.id for p in scene.objects)) for scene in out if scene.relation}
    records = list(load_index(data).records("train"))
    assert not pairs & {tuple(sorted(record.meta["concepts"])) for record in records if record.meta["relation"]}
    longest = [max(len(record.captions[name][0]) for name in ("en", "de")) for record in records]
    assert min(longest) < 12 < 40 < max(longest)  # brief ones and dense ones


def test_same_config_same_data_and_nothing_is_overwritten_unasked(pictograms, tmp_path):

    again = prepare_openmoji(tiny(tmp_path / "again"), progress=False)
    assert load_index(again).fingerprint == load_index(pictograms).fingerprint
    with pytest.raises(LensError, match="--overwrite"):
        prepare_openmoji(tiny(again), progress=False)
    other = prepare_openmoji(tiny(again, seed=1, overwrite=True), progress=False)
    assert load_index(other).fingerprint != load_index(pictograms).fingerprint
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_ada.txt").write_text("Dear Ada")
    with pytest.raises(LensError, match="not ours to replace"):
        prepare_openmoji(tiny(tmp_path / "letters", overwrite=True), progress=False)
    for changes, words in (
        ({"languages": ("en", "xx")}, "'xx'"),
        ({"concepts": 129}, "128"),
        ({"scenes": 0, "concepts": 2, "world": "objects"}, "at least 3"),
        ({"world": "all", "concepts": 3}, "at least 4"),
        ({"densities": (0, 0, 0)}, "one must be above 0"),
    ):
        with pytest.raises(LensError, match=words):
            prepare_openmoji(tiny(tmp_path / "bad", **changes), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "letters"]  # no half-written remains


def test_validation_captions_run_out():
    config = OpenMojiConfig(concepts=3, scenes=9000, copies=0, validation=50)
    concepts, square = openmoji.load_concepts(3), [Bucket(32, 32)]
    with pytest.raises(LensError, match="too few captions"):
        list(prepare_scenes._scenes(config, concepts, square))


def save(path, size=(90, 70), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def folder_config(folder, tmp_path, **changes) -> FolderConfig:
    fixed = {"path": str(folder), "out": str(tmp_path / "out"), "size": 32, "tile": 4, "ratios": ("1:1", "3:4", "4:3")}
    return FolderConfig(**{**fixed, "min_side": 16, "validation": 0.0, **changes})


def test_folder_names_every_problem(tmp_path):
    root = tmp_path / "images"
    save(root / "good.png", seed=1).with_suffix(".txt").write_text("a red apple\nan apple\n\n", encoding="utf-8")
    save(root / "deep" / "photo.JPG", (40, 60), seed=2).with_suffix(".txt").write_text("une pomme", encoding="utf-8")
    save(root / "empty.png").with_suffix(".txt").write_text(" \n")
    save(root / "captionless.webp")
    save(root / "small.png", (80, 10)).with_suffix(".txt").write_text("thin")
    (root / "broken.png").write_bytes((root / "good.png").read_bytes()[:300])
    (root / "broken.txt").write_text("cut off")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    save(root / "latin.png")
    save(root / "movie.gif")
    save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [
        {"file_name": "a.png", "captions": {"en": "one", "de": ["eins", "ein"]}},
        {"file_name": "a.png", "text": "uno", "language": "es"},
        {"file_name": "../../secret.png", "text": "stolen"},
        {"file_name": "/etc/hostname", "text": "stolen"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "a.png"},
        {"file_name": 7, "text": "x"},
        {"file_name": "a.png", "text": "half \ud800"},
        {"file_name": "n" * 500, "text": "long"},
    ]
    save(root / "rows" / "a.png", seed=3)
    lines = [json.dumps(row) for row in rows] + ["{not json", "[" * 100_000]
    (root / "rows" / "metadata.jsonl").write_text("\n".join(lines))
    save(root / "table" / "b.png", seed=4)
    with open(root / "table" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption", "language"], ["b.png", "two, or more", "it"], ["b.png"]])

    out = prepare_folder(folder_config(root, tmp_path), progress=False)
    manifest = load_index(out)
    assert dict(manifest.dropped) == {
        "bad caption": 1,
        "bad row": 6,
        "cannot be used": 1,
        "empty caption": 1,
        "format not accepted": 1,
        "missing image": 2,
        "no caption": 1,
        "outside the folder": 3,
        "too small": 1,
    }
    assert {entry["file"] for entry in manifest.failed} >= {
        "broken.png",
        "empty.png",
        "link.png",
        "rows/metadata.jsonl:3",
    }
    assert sum(counts.get("too small", 0) for counts in manifest.dropped_by_bucket.values()) == 1
    kept = {record.source: record for record in manifest.records("train")}
    assert {name: dict(record.captions) for name, record in kept.items()} == {
        "good.png": {"en": ("a red apple", "an apple")},
        "deep/photo.JPG": {"en": ("une pomme",)},
        "rows/a.png": {"en": ("one",), "de": ("eins", "ein"), "es": ("uno",)},
        "table/b.png": {"it": ("two, or more",)},
    }
    assert (kept["deep/photo.JPG"].height, kept["deep/photo.JPG"].width) == (36, 28)
    for record in kept.values():
        assert decode_image(record).shape == (record.height, record.width, 3)

    with pytest.raises(LensError, match="strict"):
        prepare_folder(folder_config(root, tmp_path, strict=True, out=str(tmp_path / "strict")), progress=False)
    assert not (tmp_path / "strict").exists()


def test_folder_splits_and_refusals(tmp_path):
    root = tmp_path / "images"
    for seed in range(40):
        save(root / f"{seed:02d}.png", (40, 40), seed // 2).with_suffix(".txt").write_text(f"image {seed}")
    out = prepare_folder(folder_config(root, tmp_path, validation=0.3, encoding="png"), progress=False)
    manifest = load_index(out)
    train, validation = ({record.image for record in manifest.records(split)} for split in ("train", "validation"))
    assert train
    assert validation
    assert not train & validation  # duplicates stay on one side
    for changes, words in (
        ({"path": str(tmp_path / "none")}, "no such folder"),
        ({"path": str(tmp_path / "out"), "out": str(tmp_path / "x")}, "no images"),
        ({"out": str(root / "inside")}, "inside"),
        ({"encoding": "bmp"}, "bmp"),
        ({"buckets": ("lens512",)}, "lens-512"),
        ({"buckets": ("lens-512",), "out": str(tmp_path / "x")}, "40 too small"),
    ):
        with pytest.raises(LensError, match=words):
            prepare_folder(folder_config(root, tmp_path, **changes), progress=False)


def test_tfds_reads_it_back_without_tensorflow(pictograms, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    code = f"""
import sys
from lens_jax.data.index import load_index
from lens_jax.data.records import decode_image
from lens_jax.data.tfds_builder import as_tfds
builder = as_tfds({str(pictograms)!r}, {str(tmp_path)!r})
expected = {{}}
for record in load_index({str(pictograms)!r}).records("train"):
    expected.setdefault(record.captions["en"][0].encode(), []).append(decode_image(record).tobytes())
source = builder.as_data_source(split="train")
assert len(source) == 224, len(source)
for row in range(len(source)):
    example = source[row]
    text = dict(zip(example["captions"]["language"], example["captions"]["text"]))[b"en"]
    assert example["image"].tobytes() in expected[text]
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("place", ["external_sort.open", "index_writer._TableWriter._flush", "index_writer.os.replace"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, place):
    root = tmp_path / "images"
    captioned(root, ["x" * 300] * 6)
    (root / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "%s"}\n' % ("x" * 9000))
    monkeypatch.setattr(folder, "ROOM", 9000)  # for the names, not for the table

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"lens_jax.data.{place}", full, raising=False)
    with pytest.raises(LensError, match=r"/\.?out.*: cannot be written: No space left on device$"):
        prepare_folder(folder_config(root, tmp_path), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def captioned(root, captions):
    for number, text in enumerate(captions):
        save(root / f"{number:03d}.png", (40, 40), number).with_suffix(".txt").write_text(text)


def test_caption_lengths_are_classes_of_their_own(tmp_path):
    """Streams by the longest caption of each record and the 22 tokens behind it; what is longer has any length."""
    root = tmp_path / "images"
    captioned(root, ["x " * n for n in range(1, 61)])
    config = folder_config(root, tmp_path, caption_classes=(32, 64), ratios=("1:1",))
    counted = load_index(prepare_folder(config, progress=False, count_tokens=lambda text: len(text.split())))
    assert [(s.text_class, s.records) for s in counted.streams] == [(32, 10), (64, 32), (0, 18)]
    assert counted.caption_count == "tokenizer"
    for stream, record in zip(np.repeat(counted.streams, [10, 32, 18]), counted.records("train")):
        length = 22 + len(record.captions["en"][0].split())
        assert caption_length.text_class(length, (32, 64)) == stream.text_class
    estimated = load_index(prepare_folder(dataclasses.replace(config, overwrite=True), progress=False))
    assert estimated.caption_count == "estimate"
    assert [(s.text_class, s.records) for s in estimated.streams] == [(32, 15), (64, 45)]
    for changes, words in (({"caption_classes": (64, 32)}, "ascend"), ({"tokenizer": "x"}, "count_tokens")):
        with pytest.raises(LensError, match=words):
            prepare_folder(dataclasses.replace(config, overwrite=True, **changes), progress=False)


def test_records_come_in_a_random_order_that_stays(tmp_path, monkeypatch):
    """Whatever the number of threads and the memory there is; two folders of the same images, the same records."""
    root = tmp_path / "images"
    captioned(root, [str(n) for n in range(50)])
    order = lambda path: [int(record.captions["en"][0]) for record in load_index(path).records("train")]
    one = prepare_folder(folder_config(root, tmp_path), progress=False)
    found = order(one)
    assert sorted(found) == list(range(50))
    assert abs(np.corrcoef(found, range(50))[0, 1]) < 0.45  # three standard errors of no correlation
    (tmp_path / "elsewhere").mkdir()
    moved = root.rename(tmp_path / "elsewhere" / "images")
    monkeypatch.setattr(folder, "ROOM", 500)
    again = prepare_folder(folder_config(moved, tmp_path, out=str(tmp_path / "again"), threads=7), progress=False)
    assert load_index(again).fingerprint == load_index(one).fingerprint
    assert sorted(path.name for path in again.iterdir()) == [NAME, "train-32x32", "train-32x32.shards"]
    for changes, expected in (({"shuffle": False}, list(range(50))), ({"seed": 1}, None)):
        out = prepare_folder(folder_config(moved, tmp_path, out=str(tmp_path / "other"), **changes), progress=False)
        assert order(out) == expected if expected else order(out) != found
        shutil.rmtree(out)
