"""The networks that score images against transformers' own: preprocessing, features, scores, names and sizes."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lens_jax.convert import vit as convert
from lens_jax.data.engine.scorers import aesthetic, clip, watermark
from lens_jax.models import vit

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "engine"))
import tiny_networks

pytestmark = pytest.mark.oracle

GOLDEN = Path(__file__).parents[1] / "goldens" / "vision.json"
FIELDS = ("embedding", "aesthetic", "watermark")
OURS = {"embedding": clip, "aesthetic": aesthetic, "watermark": watermark}
PROCESSORS = dict(zip(FIELDS, (CLIPImageProcessorPil, SiglipImageProcessorPil, SiglipImageProcessorPil)))
MODELS = dict(zip(FIELDS, (CLIPVisionModelWithProjection, SiglipVisionModel, SiglipForImageClassification)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    return {field: tiny_networks.write(root / field, field) for field in FIELDS}


@torch.no_grad()
def theirs(field: str, folder: Path, images, dtype=torch.float32) -> np.ndarray:
    """Scores as their authors' code makes them of images."""
    pixels = processed(field, folder, images).to(dtype)
    model, report = MODELS[field].from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    # A classifier has a pooling that it does not use, and of which the tiny one has a part.
    assert all(key.startswith("vision_model.head.") for key in report["missing_keys"]), report
    assert field == "watermark" or not report["missing_keys"], report
    found = model.eval()(pixels)
    if field == "embedding":
        return torch.nn.functional.normalize(found.image_embeds).float().numpy()
    if field == "watermark":
        return found.logits.softmax(-1)[:, 1].float().numpy()
    tensors = {name: torch.from_numpy(x) for name, x in tiny_networks.head().items()}
    sizes = [tiny_networks.SIZES["hidden_size"], 1024, 128, 64, 16, 1]
    layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    # Dropout between them, which does nothing here and counts in the names.
    dropped = [part for layer in layers for part in (layer, torch.nn.Dropout(0.5))][:-1]
    head = torch.nn.Sequential(*dropped).eval()
    head.load_state_dict({name.removeprefix("scoring_head."): x for name, x in tensors.items()})
    pooled = found.pooler_output
    return head.to(dtype)(pooled / pooled.norm(dim=-1, keepdim=True))[:, 0].float().numpy()


def processed(field: str, folder: Path, images) -> torch.Tensor:
    """Pixels [B, 3, side, side] by the processor of transformers."""
    processor = PROCESSORS[field].from_pretrained(folder)
    return processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").pixel_values


def ours(field: str, folder: Path, images, dtype="float32") -> np.ndarray:
    scorer = OURS[field].load(str(folder), dtype)
    return scorer.score(np.stack([scorer.prepare(image) for image in images]))[field]


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("field", FIELDS)
def test_scores(field, folders):
    """From images to scores; and they are the numbers that the tests without PyTorch compare with."""
    images = tiny_networks.images()
    expected = theirs(field, folders[field], images)
    spread = expected.std(0).mean()
    assert spread > 1e-3, "all images score alike"
    assert relative_error(ours(field, folders[field], images), expected) <= 5e-6
    golden = json.loads(GOLDEN.read_text())
    assert relative_error(golden[field], expected) <= 2e-6


@pytest.mark.parametrize("field", FIELDS)
def test_scores_in_bfloat16(field, folders):
    """No farther from float32 than transformers in bfloat16, but for a half; its head of the aesthetic score is too."""
    images = tiny_networks.images()
    expected = theirs(field, folders[field], images)
    their_error = relative_error(theirs(field, folders[field], images, torch.bfloat16), expected)
    error = relative_error(ours(field, folders[field], images, "bfloat16"), expected)
    assert 0 < error <= 1.5 * their_error


@pytest.mark.parametrize("field", FIELDS)
def test_preprocessing(field, folders):
    """Odd sizes of many kinds, shrunk and enlarged: what their processor gives, and two levels beside it at most where
    an image is so long that we resize its middle alone."""
    rng = np.random.default_rng(0)
    sizes = [(1, 40), (40, 1), (31, 31), (33, 32), (32, 33), (640, 481), (481, 640), (35, 1999), (2001, 34)]
    sizes += [(1, 100), (200, 3), (3, 299), (300, 4)]
    sizes += [tuple(int(side) for side in rng.integers(3, 300, 2)) for _ in range(80)]
    images = tiny_networks.images(sizes)
    scorer = OURS[field].load(str(folders[field]), "float32")
    pixels = np.stack([scorer.prepare(image) for image in images])
    normalised = np.asarray(scorer.preprocessing.normalise(pixels)).transpose(0, 3, 1, 2)
    expected = processed(field, folders[field], images).numpy()
    levels = np.abs(normalised - expected) * 255 * np.reshape(scorer.preprocessing.std, (3, 1, 1))
    assert levels.max() <= 2.001
    long = np.array([max(size) > 64 * min(size) for size in sizes])
    assert levels[~long].max() <= 1e-3
    assert 4 <= long.sum() < 10


RELEASED = {
    "embedding": (vit.CLIP_L14, {
        "model_type": "clip", "projection_dim": 768, "vision_config": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
            "patch_size": 14, "projection_dim": 768,
        },
    }),
    "aesthetic": (vit.SIGLIP_SO400M_384, {
        "model_type": "siglip", "vision_config": {
            "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
        },
    }),
    # All else is as transformers assumes.
    "watermark": (vit.SIGLIP2_BASE_224, {
        "model_type": "siglip", "id2label": {"0": "No Watermark", "1": "Watermark"},
        "vision_config": {"model_type": "siglip_vision_model"},
    }),
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_released_names_and_sizes(field):
    """The released networks without memory: our config of their config.json, and names and shapes of all tensors."""
    config, values = RELEASED[field]
    assert convert.config_from_release(values, "config.json", tiny_networks.POOLS[field]) == config
    their_config = (CLIPConfig if field == "embedding" else SiglipConfig)(**values)
    with torch.device("meta"):
        given = their_config if field == "watermark" else their_config.vision_config
        model = MODELS[field](given)
    # A tower alone is without the name of its place in the whole.
    place = "vision_model." if field == "aesthetic" else ""
    expected = {place + name: tuple(x.shape) for name, x in model.named_parameters()}
    if field == "watermark":  # the pooling that it does not use
        expected = {name: shape for name, shape in expected.items() if not name.startswith("vision_model.head.")}
    assert {rule.name: rule.shape for rule in convert.rules(config)} == expected
    assert sum(map(np.prod, expected.values())) == vit.parameter_count(config)
