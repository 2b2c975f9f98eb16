"""The classifier of unsafe images: preprocessing and scores as timm has them, hostile folders, and a build with it."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.data.engine import build as building
from lens_jax.data.engine.config import EngineConfig, Models, Source, Thresholds
from lens_jax.data.engine.score import Score
from lens_jax.data.engine.scorers import nsfw_eva
from lens_jax.data.engine.scorers.timm_transform import read_transform
from lens_jax.data.engine.supervisor import Options
from lens_jax.errors import LensError


@pytest.fixture(scope="module")
def folder(goldens):
    return goldens / "tiny_eva"


@pytest.fixture(scope="module")
def answers(folder):
    """timm's: images uint8, what its transform makes of them [3, 3, 24, 24], and logits."""
    return SafetensorsFile(folder / "io.safetensors")


@pytest.fixture(scope="module")
def images(answers):
    return [answers[name] for name in sorted(answers) if name.startswith("image")]


@pytest.fixture(scope="module")
def scorer(folder):
    return nsfw_eva.load(str(folder), "float32")


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_scores_are_timms(scorer, answers, images):
    prepared = np.stack([scorer.prepare(image) for image in images])
    assert (prepared.dtype, scorer.size, scorer.columns) == (np.uint8, (24, 24), ("nsfw",))
    # Odd sizes, and not a bit off: Pillow resizes for both.
    theirs = answers["prepared"].transpose(0, 2, 3, 1)
    mean, std = np.asarray(scorer.transform.mean), np.asarray(scorer.transform.std)
    np.testing.assert_array_equal(prepared, np.round((theirs * std + mean) * 255))
    # Compiled, a division by a constant is a product with its inverse, which is rounded.
    np.testing.assert_allclose(jax.jit(scorer.transform.normalise)(prepared), theirs, rtol=0, atol=5e-7)
    found = scorer.score(prepared)["nsfw"]
    np.testing.assert_allclose(found, softmax(answers["logits"].astype(np.float64)), atol=2e-6)
    assert found.argmax(-1).tolist() == answers["logits"].argmax(-1).tolist()
    assert np.ptp(found, axis=0).max() > 0.01  # the images are told apart


def test_a_score_does_not_depend_on_its_batch(scorer, images):
    prepared = np.stack([scorer.prepare(image) for image in images])
    together = scorer.score(np.concatenate([prepared, np.zeros((5, 24, 24, 3), np.uint8)]))["nsfw"]
    for image, expected in zip(prepared, together):
        # Sums of other lengths differ in their last bits.
        np.testing.assert_allclose(scorer.score(image[None])["nsfw"][0], expected, atol=1e-6)
    assert together.shape == (8, 4)


def test_transform_crops_the_middle():
    """Columns numbered by their place, so that it shows which are left."""
    picture = np.broadcast_to(np.arange(30, dtype=np.uint8)[None, :, None], (10, 30, 3))
    cropped = read_transform({"crop_mode": "center"}, 10, "config.json").resize(picture)
    np.testing.assert_array_equal(cropped[0, :, 0], np.arange(10, 20))
    squashed = read_transform({"crop_mode": "squash"}, 10, "config.json").resize(picture)
    assert squashed[0, 0, 0] <= 2
    assert squashed[0, -1, 0] >= 27


def changed_config(path, change):
    values = json.loads((path / "config.json").read_text())
    change(values)
    (path / "config.json").write_text(json.dumps(values))


def changed_weights(path, change):
    tensors = load_file(path / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, path / "model.safetensors")


def of_config(**values):
    return lambda path: changed_config(path, lambda config: config.update(values))


def of_preprocessing(**values):
    return lambda path: changed_config(path, lambda config: config["pretrained_cfg"].update(values))


def of_sizes(**values):
    return lambda path: changed_config(path, lambda config: config["model_args"].update(values))


def of_weights(change):
    return lambda path: changed_weights(path, change)


def write(name, data):
    return lambda path: (path / name).write_bytes(data)


def truncated(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def pipe(path):
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def one(name, value):
    def change(tensors):
        tensors[name].flat[-1] = value

    return change


HOSTILE = {
    "no config": (lambda path: (path / "config.json").unlink(), "config.json"),
    "config of no JSON": (write("config.json", b"{'a': 1}"), "cannot be read as JSON"),
    "config of a list": (write("config.json", b"[]"), "JSON object"),
    "another network": (of_config(architecture="resnet50"), "architecture is 'resnet50'; accepted: eva02_base"),
    "another head": (of_config(global_pool="token"), "global_pool is 'token'; accepted: avg"),
    "two classes": (of_config(num_classes=2), "num_classes is 2; accepted: 4, which are neutral, low, medium, high"),
    "classes as text": (of_config(num_classes="4"), "num_classes is '4'; accepted: a whole number"),
    "levels turned": (of_config(label_names=["high", "medium", "low", "neutral"]), "label_names is"),
    "other labels": (of_config(id2label={"0": "cat", "1": "dog", "2": "cow", "3": "hen"}), "id2label is"),
    "labels that are no names": (of_preprocessing(label_names=7), "pretrained_cfg.label_names is 7"),
    "preprocessing that is none": (of_config(pretrained_cfg=3), "pretrained_cfg is 3; accepted: an object"),
    "sizes that are none": (of_config(model_args=[1]), "model_args is [1]; accepted: an object"),
    "many layers": (of_sizes(depth=10**9), "model_args.depth is 1000000000; accepted: a whole number from 1 to 64"),
    "a huge image": (of_sizes(img_size=2**40), "model_args.img_size"),
    "an image that does not divide": (of_sizes(img_size=25), "eva.image 25 must be a multiple"),
    "heads that do not divide": (of_sizes(num_heads=5), "multiple of 4 eva.heads"),
    "a width that is no number": (of_sizes(mlp_ratio=float("nan")), "model_args.mlp_ratio is nan"),
    "an oblong grid": (of_sizes(ref_feat_shape=[4, 5]), "model_args.ref_feat_shape is [4, 5]; accepted: a whole"),
    "sides in a list": (of_sizes(img_size=[24]), "model_args.img_size is [24]; accepted: a whole number"),
    "another kind of block": (of_sizes(qkv_fused=True), "model_args.qkv_fused is True; accepted: False"),
    "a size that we do not know": (of_sizes(num_reg_tokens=4), "model_args.num_reg_tokens is 4; accepted: img_size"),
    "another size of input": (of_preprocessing(input_size=[3, 28, 28]), "input_size is [3, 28, 28]; accepted: [3, 24"),
    "a crop of no kind": (of_preprocessing(crop_mode="border"), "crop_mode is 'border'; accepted: squash, center"),
    "a crop of nothing": (of_preprocessing(crop_pct=0), "crop_pct is 0; accepted: a number within 0.5 to 1"),
    "a filter of no kind": (of_preprocessing(interpolation="random"), "interpolation is 'random'; accepted: bicubic"),
    "a filter that is no name": (of_preprocessing(interpolation=["bicubic"]), "interpolation is ['bicubic']"),
    "two means": (of_preprocessing(mean=[0.5, 0.5]), "mean is [0.5, 0.5]; accepted: three numbers"),
    "no deviation": (of_preprocessing(std=[0.5, 0, 0.5]), "std is [0.5, 0, 0.5]; accepted: three numbers"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors"),
    "half the weights": (truncated, "model.safetensors"),
    "weights on their way": (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "LFS"),
    "a web page": (write("model.safetensors", b"<!DOCTYPE html>"), "a web page, not weights"),
    "a pickle": (write("model.safetensors", b"PK\x03\x04" + bytes(100)), "model.safetensors"),
    "a pipe": (pipe, "model.safetensors"),
    "a tensor missing": (of_weights(lambda t: {k: t[k] for k in t if k != "head.bias"}), "head.bias is missing"),
    "a tensor over": (of_weights(lambda t: t.update({"blocks.0.gamma_1": t["cls_token"]})), "gamma_1 is not expected"),
    "a layer over": (
        of_weights(lambda t: t.update({k.replace("s.1.", "s.2."): t[k] for k in list(t)})),
        "19 of 46 tensors do not fit: blocks.2.",
    ),
    "a tensor misshapen": (
        of_weights(lambda t: t.update(pos_embed=t["pos_embed"][:, 1:].copy())), "pos_embed is [1, 36, 24], expected",
    ),
    "whole numbers": (of_weights(lambda t: t.update({"head.bias": np.zeros(4, np.int32)})), "head.bias is int32"),
    "not a number": (of_weights(one("blocks.1.mlp.fc2.weight", np.nan)), "blocks.1.mlp.fc2.weight has numbers"),
    "an infinite number": (of_weights(one("cls_token", -np.inf)), "cls_token has numbers that are not finite"),
    "a number too large": (of_weights(one("pos_embed", 3.4e38)), "pos_embed has numbers that are not finite in bf"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(case, folder, tmp_path):
    """One line that names the file and what is wrong, before anything is computed."""
    path = tmp_path / "net"
    shutil.copytree(folder, path)
    damage, said = HOSTILE[case]
    damage(path)
    with pytest.raises(LensError) as caught:
        nsfw_eva.load(str(path), "bfloat16")
    message = str(caught.value)
    assert said.replace("in bf", "in bfloat16") in message
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1500


def test_what_other_programs_write_is_accepted(folder, tmp_path, scorer, images):
    """transformers' prefix and names of classes, half precision, and no preprocessing of its own."""
    path = tmp_path / "net"
    shutil.copytree(folder, path)
    changed_weights(path, lambda t: {f"timm_model.{name}": array.astype(np.float16) for name, array in t.items()})
    names = {str(i): level for i, level in enumerate(nsfw_eva.LEVELS)}
    of_config(model_type="timm_wrapper", id2label=names, pretrained_cfg=None)(path)
    batch = np.stack([scorer.prepare(image) for image in images])
    other = nsfw_eva.load(str(path), "float32")
    assert other.transform == scorer.transform
    np.testing.assert_allclose(other.score(batch)["nsfw"], scorer.score(batch)["nsfw"], atol=5e-3)


def test_fingerprint(folder, tmp_path):
    """Of every bit of both files, and of nothing else."""
    path = tmp_path / "net"
    shutil.copytree(folder, path)
    (path / "README.md").write_text("a card")
    first = nsfw_eva.fingerprint(str(folder))
    assert nsfw_eva.fingerprint(str(path)) == first
    assert len(first) == hashlib.sha256().digest_size * 2
    changed_weights(path, one("head.bias", 0.5))
    second = nsfw_eva.fingerprint(str(path))
    of_preprocessing(crop_mode="center")(path)
    assert len({first, second, nsfw_eva.fingerprint(str(path))}) == 3
    # Before a run begins a folder is looked at, but for its numbers.
    pipe(path)
    with pytest.raises(LensError, match="not a file"):
        nsfw_eva.fingerprint(str(path))
    with pytest.raises(LensError, match=r"models.nsfw: 'nude_net' is no folder; accepted: open_nsfw, empty, or"):
        nsfw_eva.fingerprint("nude_net")


def test_a_build_scores_with_it(folder, scorer, tmp_path):
    """From files to data sets by the config alone: what it stores is what the network says, and step 3 goes by it."""
    collection, rng = tmp_path / "images", np.random.default_rng(0)
    collection.mkdir()
    expected = {}
    for i in range(12):
        rough = rng.integers(30, 220, (12, 12, 3)).astype(np.uint8)
        picture = Image.fromarray(rough).resize((48 + i, 40 + 3 * i), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        (collection / f"{i:02d}.png").write_bytes(buffer.getvalue())
        (collection / f"{i:02d}.txt").write_text("a caption")
        expected[f"{i:02d}.png"] = scorer.score(scorer.prepare(np.asarray(picture))[None])["nsfw"][0]
    unsafe = sorted(scores[2] + scores[3] for scores in expected.values())
    threshold = float(unsafe[5] + unsafe[6]) / 2
    config = EngineConfig(
        sources=(Source("web", "folder", str(collection), caption="keep"),),
        work=str(tmp_path / "work"),
        out=str(tmp_path / "out"),
        thresholds=Thresholds(area=32 * 32, nsfw=threshold),
        models=Models(nsfw=str(folder), dtype="float32"),
        buckets=("32x32",),
        unit_rows=5,
    )
    page = building.build(config, Options(workers=0, accept_losses=True), show=False).read_text()
    rows = {}
    for stage in ("probe", "score", "select"):
        tables = [pq.read_table(path) for path in sorted((tmp_path / "work" / stage).rglob("*.parquet"))]
        rows[stage] = {row["id"]: row for table in tables for row in table.to_pylist()}
    assert len(rows["score"]) == 12
    for name, row in rows["score"].items():
        scores = expected[rows["probe"][name]["key"]]
        np.testing.assert_allclose(row["nsfw"], scores, atol=1e-3)  # they are stored in float16
        assert rows["select"][name]["kept"] == (scores[2] + scores[3] < threshold)
        assert rows["select"][name]["reason"] in (None, "unsafe")
    assert sum(row["kept"] for row in rows["select"].values()) == 6
    assert "Not run: aesthetic score, watermark, near duplicates" in page

    # Other weights are another network: its scores are made anew, and its folder's place does not matter.
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    same = dataclasses.replace(config, models=dataclasses.replace(config.models, nsfw=str(moved)))
    assert Score().settings(same) == Score().settings(config)
    changed_weights(moved, one("head.bias", 0.5))
    assert Score().settings(same) != Score().settings(config)


@pytest.mark.slow
def test_eight_devices(folder, scorer, images):
    """The rows of a batch on eight devices, and of one that they do not divide: the scores of one device."""
    script = """
import io, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from lens_jax.data.engine.scorers import nsfw_eva
scorer = nsfw_eva.load(sys.argv[1], "float32")
batch = np.load(io.BytesIO(sys.stdin.buffer.read()))
assert len(jax.devices()) == 8
np.save(sys.stdout.buffer, np.concatenate([scorer.score(batch)["nsfw"], scorer.score(batch[:3])["nsfw"]]))
"""
    batch = np.concatenate([np.stack([scorer.prepare(image) for image in images])] * 6)[:16]
    buffer = io.BytesIO()
    np.save(buffer, batch)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], input=buffer.getvalue(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found = np.load(io.BytesIO(done.stdout))
    alone = scorer.score(batch)["nsfw"]
    np.testing.assert_allclose(found, np.concatenate([alone, alone[:3]]), atol=1e-6)
