"""EVA-02 and its preprocessing against timm: random weights, its names, its transform, its own folders.

`python tests/oracle/test_eva.py tests/goldens/tiny_eva` writes the golden of the default tests anew.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")
import timm
import torch
from flax import traverse_util
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from lens_jax.convert import eva as convert_eva
from lens_jax.convert.folder import open_component
from lens_jax.convert.table import Tensors, specs_of
from lens_jax.data.engine.scorers import nsfw_eva
from lens_jax.data.engine.scorers.timm_transform import read_transform
from lens_jax.models import eva

pytestmark = pytest.mark.oracle

ARCHITECTURE = convert_eva.ARCHITECTURE
# Sizes as timm's `model_args`; a grid of 6 x 6 beside a pre-training grid of 4 x 4, one of 3 x 3 beside 16 x 16.
SIZES = {
    "tiny": {
        "img_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "ref_feat_shape": [4, 4],
    },
    "deep": {"img_size": 42, "embed_dim": 96, "depth": 5, "num_heads": 3, "mlp_ratio": 3.5},
    "released": {},
}  # fmt: skip
# Wide, tall, as large as the network's input, of one pixel, and smaller.
PICTURES = [(37, 53), (640, 471), (301, 999), (448, 448), (1, 1), (449, 17), (24, 24)]
MODEL_CARD = "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k"


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def theirs(sizes: dict):
    """timm's network with random weights of which none is trivial."""
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=4, **sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_()
            if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
                parameter.mul_(0.1).add_(1)
            elif parameter.ndim == 1 or name in ("cls_token", "pos_embed"):
                parameter.mul_(0.1)
            else:
                parameter.div_(parameter[0].numel() ** 0.5)
    return model


def config_json(model, sizes: dict) -> dict:
    """As timm writes it to a folder of its hub."""
    side = sizes.get("img_size", 448)
    pretrained = {
        "tag": "mim_in22k_ft_in22k_in1k", "custom_load": False, "input_size": [3, side, side], "fixed_input_size": True,
        "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash",
        "mean": list(model.default_cfg["mean"]), "std": list(model.default_cfg["std"]), "num_classes": 4,
        "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    values = {"architecture": ARCHITECTURE, "num_classes": 4, "num_features": model.num_features, "global_pool": "avg"}
    return {**values, **({"model_args": sizes} if sizes else {}), "pretrained_cfg": pretrained}


def transform_of(model):
    """timm's own for a network of another size."""
    size = (3, *model.patch_embed.img_size)
    return create_transform(**resolve_data_config({"input_size": size}, model=model))


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in PICTURES]


@pytest.mark.parametrize("size", SIZES)
def test_logits(size):
    sizes = SIZES[size]
    model = theirs(sizes)
    config = convert_eva.config_from_release(config_json(model, sizes), size, dtype="float32")
    numbers = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    lazy = convert_eva.leaves(config, Tensors(specs_of(numbers), numbers.__getitem__), "timm")
    params = traverse_util.unflatten_dict(dict(lazy), sep="/")
    batch = 1 if size == "released" else 2  # 214 GFLOP an image
    pixels = np.random.default_rng(0).standard_normal((batch, config.image, config.image, 3), np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).numpy()
    actual = jax.jit(functools.partial(eva.apply, config))(params, pixels)
    print(size, "relative error", relative_error(actual, expected), expected)
    assert relative_error(actual, expected) <= 5e-6


def test_transform_of_the_model_card():
    """The one its authors' package takes, bit by bit."""
    transform = create_transform(**resolve_data_config(get_pretrained_cfg(MODEL_CARD).__dict__))
    ours = read_transform({}, 448, "config.json")
    for picture in pictures():
        expected = transform(Image.fromarray(picture)).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours.normalise(ours.resize(picture)), expected)


@pytest.mark.parametrize("crop_mode", ["squash", "center"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_transforms(crop_mode, crop_pct, interpolation):
    values = {
        "input_size": [3, 24, 24], "crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation,
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.5, 1.0],
    }  # fmt: skip
    transform, ours = create_transform(**resolve_data_config(values)), read_transform(values, 24, "config.json")
    for picture in pictures():
        expected = transform(Image.fromarray(picture)).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours.normalise(ours.resize(picture)), expected)


def test_a_folder_of_timm(tmp_path):
    """Saved by timm itself, with its own config.json, and scored from there as its authors' package scores."""
    from timm.models import save_for_hf

    sizes = SIZES["tiny"]
    model = theirs(sizes)
    save_for_hf(model, tmp_path, model_args=sizes, safe_serialization=True)
    print((tmp_path / "config.json").read_text())
    scorer = nsfw_eva.load(str(tmp_path), "float32")
    transform = transform_of(model)
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.fromarray(picture)) for picture in pictures()]))
    expected = torch.exp(torch.log_softmax(logits, -1)).numpy()
    actual = scorer.score(np.stack([scorer.prepare(picture) for picture in pictures()]))["nsfw"]
    assert np.abs(actual - expected).max() <= 1e-5


def test_a_folder_of_transformers(tmp_path):
    """A `timm_wrapper`, which the published network is, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = SIZES["tiny"]
    model = theirs(sizes)
    values = config_json(model, sizes)
    names = {str(i): level for i, level in enumerate(nsfw_eva.LEVELS)}
    config = transformers.TimmWrapperConfig.from_dict(
        {**values, "model_type": "timm_wrapper", "id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
    )
    wrapped = transformers.TimmWrapperForImageClassification(config).eval()
    wrapped.timm_model.load_state_dict(model.state_dict())
    wrapped.save_pretrained(tmp_path)
    print((tmp_path / "config.json").read_text(), list(open_component(tmp_path / "model.safetensors"))[:3])
    scorer = nsfw_eva.load(str(tmp_path), "float32")
    batch = np.stack([scorer.prepare(picture) for picture in pictures()])
    pixels = np.asarray(scorer.transform.normalise(batch))
    with torch.no_grad():
        logits = wrapped(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).logits
    assert np.abs(scorer.score(batch)["nsfw"] - torch.softmax(logits, -1).numpy()).max() <= 1e-5


def test_the_golden_is_timms():
    """What default tests compare with comes out of timm again."""
    from safetensors.torch import load_file

    folder = Path(__file__).parents[1] / "goldens" / "tiny_eva"
    model = timm.create_model(
        ARCHITECTURE, num_classes=4, **json.loads((folder / "config.json").read_text())["model_args"]
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    answers = load_file(folder / "io.safetensors")
    for name, expected in answers_of(model.eval()).items():
        torch.testing.assert_close(answers[name], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def answers_of(model) -> dict[str, torch.Tensor]:
    """Images, what the transform makes of them, and logits."""
    transform = transform_of(model)
    images = {f"image_{i}": torch.from_numpy(picture) for i, picture in enumerate(pictures()[:3])}
    images = {name: image[:61, :73] for name, image in images.items()}
    prepared = torch.stack([transform(Image.fromarray(image.numpy())) for image in images.values()])
    images = {name: image.contiguous() for name, image in images.items()}
    return {**images, "prepared": prepared, "logits": model(prepared)}


if __name__ == "__main__":
    from safetensors.torch import save_file

    folder, sizes = Path(sys.argv[1]), SIZES["tiny"]
    network = theirs(sizes)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(network, sizes), indent=1) + "\n")
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    save_file(answers_of(network), folder / "io.safetensors")
