"""The networks of a release that score images: their numbers, their files, and a build that uses them."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from lens_jax.convert import vit as convert
from lens_jax.convert import writer
from lens_jax.convert.folder import open_component
from lens_jax.data.engine import build as building
from lens_jax.data.engine.config import EngineConfig, Models, Source, Thresholds
from lens_jax.data.engine.score import Score
from lens_jax.data.engine.scorers import aesthetic, clip, watermark
from lens_jax.data.engine.supervisor import Options
from lens_jax.data.index import load_index
from lens_jax.errors import LensError
from lens_jax.models import vit

sys.path.insert(0, str(Path(__file__).parent))
import tiny_networks

FIELDS = ("embedding", "aesthetic", "watermark")
OURS = {"embedding": clip, "aesthetic": aesthetic, "watermark": watermark}
GOLDEN = Path(__file__).parents[2] / "goldens" / "vision.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    return {field: tiny_networks.write(root / field, field) for field in FIELDS}


@pytest.fixture(scope="module")
def scorers(folders):
    return {field: OURS[field].load(str(folders[field]), "float32") for field in FIELDS}


def score(scorer, images):
    return scorer.score(np.stack([scorer.prepare(image) for image in images]))[scorer.columns[0]]


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("field", FIELDS)
def test_scores_are_those_of_transformers(field, scorers):
    """From images to scores, in float32; a row's do not depend on what else is in the batch."""
    expected, images = np.array(json.loads(GOLDEN.read_text())[field]), tiny_networks.images()
    found = score(scorers[field], images)
    assert found.dtype == np.float32
    # Pillow 13, which the golden was made with, shrinks one of the images otherwise than those before it.
    assert relative_error(found, expected) <= (5e-6 if int(PIL.__version__.split(".")[0]) >= 13 else 2e-3)
    # Other shapes of a batch are other orders of a sum.
    np.testing.assert_allclose(score(scorers[field], images[3:4]), found[3:4], rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_near(folders):
    """What halves of the weights do to scores that tell images apart; their dtype is float32 all the same."""
    golden, images = json.loads(GOLDEN.read_text()), tiny_networks.images()
    for field in FIELDS:
        found = score(OURS[field].load(str(folders[field]), "bfloat16"), images)
        assert found.dtype == np.float32
        assert 0 < relative_error(found, golden[field]) < 0.05


def test_the_head_as_one_layer():
    """The five layers one after another, in float64, and the one that is made of them."""
    tensors = tiny_networks.head()
    x = np.random.default_rng(0).standard_normal((50, tiny_networks.SIZES["hidden_size"]))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    layered = x
    for i in range(5):
        layered = layered @ tensors[f"scoring_head.{2 * i}.weight"].T.astype(np.float64)
        layered = layered + tensors[f"scoring_head.{2 * i}.bias"]
    weights, bias = aesthetic.fold(tensors_in(tensors), "head")
    assert np.ptp(layered) > 0.5
    np.testing.assert_allclose(x @ weights + bias, layered[:, 0], rtol=1e-6, atol=1e-6)


def tensors_in(arrays):
    from lens_jax.convert.table import Tensors, specs_of

    return Tensors(specs_of(arrays), arrays.__getitem__)


def test_names_go_both_ways(folders):
    """Every tensor of the release is one place of our tree, and none is left out: what is read is written as it was."""
    from lens_jax.convert import table

    for field, folder in folders.items():
        config, tensors = tiny_networks.config_of(field), open_component(folder / "model.safetensors")
        leaves = convert.leaves(config, tensors, str(folder))
        back = table.to_release(convert.rules(config), {path: leaves[path] for path in leaves})
        assert set(tensors) - set(back) == set(tiny_networks.BESIDES[field])
        for name in back:
            np.testing.assert_array_equal(back[name], tensors[name], err_msg=name)


def test_released_sizes():
    """What the model cards say: 304.0, 428.2 and, with a pooling of 7.1 million that is not used, 92.9 million."""
    counts = [vit.parameter_count(c) for c in (vit.CLIP_L14, vit.SIGLIP_SO400M_384, vit.SIGLIP2_BASE_224)]
    assert counts == [303_966_208, 428_225_600, 85_798_658]


def test_of_a_long_image_only_the_middle_is_resized(scorers):
    """To two levels what resizing the whole and cutting its middle gives; and a strip of pixels takes no memory."""
    preprocessing = scorers["embedding"].preprocessing
    for width, height in ((10, 700), (900, 13), (1, 80), (700, 9)):
        (image,) = tiny_networks.images([(width, height)])
        short = min(width, height)
        whole = [32 if side == short else int(32 * side / short) for side in (width, height)]
        resized = np.asarray(Image.fromarray(image).resize(whole, Image.Resampling.BICUBIC), np.int16)
        top, left = (whole[1] - 32) // 2, (whole[0] - 32) // 2
        levels = np.abs(preprocessing.resize(image) - resized[top : top + 32, left : left + 32])
        assert levels.max() <= 2
        assert np.ptp(resized) > 50
    assert preprocessing.resize(np.zeros((1, 2_000_000, 3), np.uint8)).shape == (32, 32, 3)


def change_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def change_tensors(folder, change, name="model.safetensors"):
    tensors = {key: np.array(value) for key, value in open_component(folder / name).items()}
    change(tensors)
    writer.write_file(folder / name, tensors)


def put(name, array):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({name: array}))


def without(name):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.pop(name))


def broken(name, value):
    def change(tensors):
        tensors[name].reshape(-1)[-1] = value

    return lambda folder: change_tensors(folder, change)


def vision(**changes):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        values["vision_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(values))

    return change


def config(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def preprocessor(**changes):
    return lambda folder: change_json(folder / "preprocessor_config.json", **changes)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


QKV = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
HEADERS = [
    ("embedding", without(QKV), rf"{QKV} is missing"),
    ("embedding", put("vision_model.more", np.zeros(3, np.float32)), r"vision_model.more is not expected"),
    ("embedding", put(QKV, np.zeros((24, 25), np.float32)), rf"{QKV} is \[24, 25\], expected \[24, 24\]"),
    ("embedding", put(QKV, np.zeros((24, 24), np.int32)), rf"{QKV} is int32, accepted: float32"),
    ("embedding", cut("model.safetensors"), r"offsets .* outside"),
    ("embedding", lambda folder: (folder / "model.safetensors").unlink(), r"no \*.safetensors"),
    ("embedding", lambda folder: (folder / "config.json").write_text("{"), r"config.json: cannot be read as JSON"),
    ("embedding", config(model_type="siglip"), r"model_type is 'siglip'; accepted: 'clip'"),
    ("embedding", vision(num_hidden_layers=10**9), r"num_hidden_layers is 1000000000; accepted"),
    ("embedding", vision(num_hidden_layers=200), r"3152 of 3208 tensors do not fit"),
    ("embedding", vision(hidden_size="24"), r"hidden_size is '24'; accepted"),
    ("embedding", vision(hidden_size=25), r"vit.width 25 must be a multiple"),
    ("embedding", vision(hidden_act="relu"), r"hidden_act is 'relu'; accepted: quick_gelu"),
    ("embedding", vision(layer_norm_eps=0), r"layer_norm_eps is 0; accepted"),
    ("embedding", config(vision_config=[]), r"vision_config is \[\]; accepted: an object"),
    ("embedding", lambda folder: (folder / "preprocessor_config.json").unlink(), r"no preprocessor_config.json"),
    ("embedding", preprocessor(crop_size=224), r"crop_size is 224; the network takes 32 x 32"),
    ("embedding", preprocessor(size={"height": 32, "width": 33}), r"size is .*; accepted: a whole number"),
    ("embedding", preprocessor(do_center_crop=False), r"do_center_crop is False; accepted: true"),
    ("embedding", preprocessor(resample=0), r"resample is 0; accepted: 2 \(bilinear\), 3"),
    ("embedding", preprocessor(image_std=[0.5, 0.5, 0]), r"image_std is .* above 0"),
    ("aesthetic", preprocessor(do_rescale=False), r"do_rescale is False; accepted: true"),
    ("aesthetic", preprocessor(rescale_factor=1.0), r"rescale_factor is 1.0; accepted: 1/255"),
    ("aesthetic", preprocessor(image_mean="0.5"), r"image_mean is '0.5'; accepted: three numbers"),
    ("aesthetic", lambda folder: (folder / aesthetic.HEAD).unlink(), r"weights_only=True\), 'aesthetic_predictor_v2_5"),
    ("aesthetic", cut(aesthetic.HEAD), r"aesthetic_predictor_v2_5.safetensors"),
    ("aesthetic", lambda folder: change_tensors(folder, lambda t: t.pop("scoring_head.4.bias"), aesthetic.HEAD),
     r"scoring_head.4.bias is missing"),
    ("watermark", config(id2label={"0": "cat", "1": "dog"}), r"id2label is \['cat', 'dog'\]; accepted: two classes"),
    ("watermark", config(id2label={"0": "Watermark", "2": "No"}), r"id2label numbers its 2 classes otherwise"),
    ("watermark", config(id2label={"0": "Watermark"}), r"classifier.weight is \[2, 24\], expected \[1, 24\]"),
    ("watermark", config(id2label=...), r"label_0"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "spoil", "message"), HEADERS, ids=[message for _, _, message in HEADERS])
def test_a_folder_is_refused_before_anything_is_read(field, spoil, message, tmp_path):
    """In one line, by what names the stage, before a build has begun."""
    folder = tiny_networks.write(tmp_path / "network", field)
    assert len(OURS[field].fingerprint(str(folder))) == 64
    spoil(folder)
    with pytest.raises(LensError, match=message) as caught:
        OURS[field].fingerprint(str(folder))
    assert "\n" not in str(caught.value)
    with pytest.raises(LensError, match=message):
        OURS[field].load(str(folder), "float32")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("field", "name"), [("embedding", QKV), ("watermark", "classifier.bias"), ("aesthetic", "scoring_head.2.weight")]
)
def test_a_number_that_is_none_is_named(field, name, value, tmp_path):
    folder = tiny_networks.write(tmp_path / "network", field)
    if name.startswith("scoring_head"):
        change_tensors(folder, lambda tensors: tensors[name].reshape(-1).__setitem__(-1, value), aesthetic.HEAD)
    else:
        broken(name, value)(folder)
    with pytest.raises(LensError, match=f"{name} has numbers that are not finite"):
        OURS[field].load(str(folder), "float32")


def test_what_is_not_read_may_be_anything(tmp_path):
    """The text tower, and sums of positions of old files, in whatever dtype."""
    folder = tiny_networks.write(tmp_path / "network", "embedding")
    before = clip.load(str(folder), "float32")
    change = {
        "vision_model.embeddings.position_ids": np.arange(5)[None],
        "text_model.embeddings.token_embedding.weight": np.full((3, 4), np.nan, np.float32),
    }
    change_tensors(folder, lambda tensors: tensors.update(change))
    images = tiny_networks.images()
    np.testing.assert_array_equal(score(clip.load(str(folder), "float32"), images), score(before, images))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(LensError, match=r"no such file or folder.*hf download openai/clip-vit-large-patch14"):
        clip.fingerprint("openai/clip-vit-large-patch14")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(LensError, match="a pickle of PyTorch"):
        clip.fingerprint(str(tmp_path))
    with pytest.raises(LensError, match="not a folder"):
        clip.fingerprint(str(tmp_path / "pytorch_model.bin"))


def test_fingerprints_tell_weights_and_preprocessing_apart(folders, tmp_path):
    """And not the name of the folder."""
    for field in FIELDS:
        known = {OURS[field].fingerprint(str(folders[field]))}
        same = tiny_networks.write(tmp_path / field / "same", field)
        assert OURS[field].fingerprint(str(same)) in known
        spoils = [broken("vision_model.post_layernorm.bias", 7), preprocessor(image_mean=[0.4, 0.5, 0.5])]
        if field == "aesthetic":
            spoils.append(
                lambda folder: change_tensors(folder, lambda t: t["scoring_head.8.bias"].fill(1), aesthetic.HEAD)
            )
        if field == "watermark":
            spoils.append(config(id2label={"0": "watermark", "1": "none"}))
        for number, spoil in enumerate(spoils):
            other = tiny_networks.write(tmp_path / field / str(number), field)
            spoil(other)
            known.add(OURS[field].fingerprint(str(other)))
        assert len(known) == 1 + len(spoils)


@pytest.mark.slow
def test_a_batch_over_several_devices(folders):
    """Two images on three simulated devices, for which a batch is filled up: the scores of one device."""
    script = Path(__file__).with_name("scores_on_devices.py")
    arguments = [sys.executable, str(script), str(folders["embedding"].parent), "2"]
    output = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr[-2000:]
    golden, found = json.loads(GOLDEN.read_text()), json.loads(output.stdout)
    assert found.keys() == golden.keys()
    for field, scores in found.items():
        assert relative_error(scores, golden[field][:2]) <= 5e-6


@pytest.fixture
def collection(tmp_path):
    folder = tmp_path / "collection"
    folder.mkdir()
    for number, image in enumerate(tiny_networks.images([(48, 40)] * 9)):
        for name in (f"{number}.png", f"{number} again.png") if number == 0 else (f"{number}.png",):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG", compress_level=9 if "again" in name else 1)
            (folder / name).write_bytes(file.getvalue())
    return folder


def test_a_build_with_networks(folders, scorers, collection, tmp_path):
    """Every image gets all scores, thresholds act on them, and what looks the same is kept once."""
    none = Thresholds(area=100, nsfw=None, laplacian=None, entropy=None, luminance=None, aesthetic=None, watermark=None)
    config = EngineConfig(
        sources=(Source("folder", "folder", str(collection), caption="keep"),),
        work=str(tmp_path / "work"),
        out=str(tmp_path / "out"),
        thresholds=dataclasses.replace(none, cosine=1 - 1e-3),
        models=Models(nsfw="", dtype="float32", batch=4, **{field: str(folders[field]) for field in FIELDS}),
        buckets=("32x32",),
        validation=0.0,
    )
    for image in collection.glob("*.png"):
        image.with_suffix(".txt").write_text("a caption")

    def kept(config):
        building.build(config, Options(workers=0, accept_losses=True), show=False, overwrite=True)
        index = load_index(Path(config.out) / "folder")
        return {record.source: record.meta for record in index.records("train")}, index.config["steps"]

    found, steps = kept(config)
    assert {row["name"]: row["dropped"] for row in steps}["duplicates"] == 1
    assert len(found) == 9
    pixels = [np.asarray(Image.open(collection / name)) for name in found]
    for field in ("aesthetic", "watermark"):
        expected = score(scorers[field], pixels)
        np.testing.assert_allclose([meta[field] for meta in found.values()], expected, rtol=2e-5)
    values = sorted(meta["aesthetic"] for meta in found.values())
    assert 1 < values[0] < values[4] < 10
    higher = dataclasses.replace(config, thresholds=dataclasses.replace(config.thresholds, aesthetic=values[4]))
    assert Score().settings(higher) == Score().settings(config)
    left, _ = kept(higher)
    assert sorted(meta["aesthetic"] for meta in left.values()) == values[4:]

    # Weights that are damaged end a build before it has begun.
    (folders["watermark"] / "model.safetensors").rename(folders["watermark"] / "away")
    try:
        with pytest.raises(LensError, match=r"watermark: no \*.safetensors"):
            kept(dataclasses.replace(config, work=str(tmp_path / "other")))
        assert not (tmp_path / "other").exists()
    finally:
        (folders["watermark"] / "away").rename(folders["watermark"] / "model.safetensors")
