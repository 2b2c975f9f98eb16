"""LensPipeline on an untrained tiny model: what an image depends on, and what it must not."""

import jax
import numpy as np
import pytest

from lens_jax.diffusion import draw as drawing
from lens_jax.encoders.sentence import SentenceEncoder
from lens_jax.errors import LensError
from lens_jax.inference import pipeline
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.models import denoiser


@pytest.fixture(scope="module")
def pipe(tiny_config):
    leaves, tree = jax.tree.flatten(denoiser.init(tiny_config.model, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Every leaf non-zero, or the prompt would not matter.
    params = tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])
    stats = {"mean": np.zeros(48, np.float32), "std": np.ones(48, np.float32)}
    return LensPipeline(
        tiny_config.model, tiny_config.codec, SentenceEncoder(tiny_config.text), params, stats, (16, 16), batch_size=4
    )


def draw(pipe, *args, **options):
    return pipe(*args, **{"num_inference_steps": 3, "output_type": "latent", **options}).images


def test_an_image_does_not_depend_on_its_neighbours(pipe):
    """Image i of a seed is the same alone, in a full batch, and in batches of another size."""
    prompts = ["cat", "red apple, blue background", "", "dog", "car", "sun"]
    together = draw(pipe, prompts, seed=7)
    other_neighbours = draw(pipe, ["fish", prompts[1], "tree", "owl"], seed=7)
    # float32: other batch sizes sum in another order.
    np.testing.assert_allclose(together[1], other_neighbours[1], atol=2e-5)
    pipe.batch_size = 6
    np.testing.assert_allclose(together, draw(pipe, prompts, seed=7), atol=2e-5)
    pipe.batch_size = 4
    assert np.abs(together[1] - draw(pipe, prompts, seed=8)[1]).max() > 0.1


def test_given_latents_are_the_noise(pipe):
    noise = drawing.seed_noise(3, 2, 16, 48)
    np.testing.assert_array_equal(draw(pipe, ["cat", "dog"], seed=3), draw(pipe, ["cat", "dog"], latents=noise))
    with pytest.raises(LensError, match=r"latents are \[1, 16, 48\]; this call needs \[2, 16, 48\]"):
        draw(pipe, ["cat", "dog"], latents=noise[:1])


def test_guidance_of_one_runs_no_second_branch(pipe, monkeypatch):
    calls = []
    apply = denoiser.apply
    monkeypatch.setattr(denoiser, "apply", lambda *a: calls.append(a[3][0].shape[1]) or apply(*a))
    for guidance_scale, text_tokens in {1.0: [4], 3.0: [4, 0]}.items():
        calls.clear()
        drawing.draw_program.clear_cache()
        draw(pipe, ["cat"], guidance_scale=guidance_scale)
        assert calls == text_tokens
    drawing.draw_program.clear_cache()


def test_negative_prompt(pipe):
    plain = draw(pipe, ["cat"])
    np.testing.assert_array_equal(plain, draw(pipe, ["cat"], negative_prompt="  "))
    assert np.abs(plain - draw(pipe, ["cat"], negative_prompt="dog")).max() > 1e-3
    with pytest.raises(LensError, match="2 negative prompts for 1 prompts"):
        draw(pipe, ["cat"], negative_prompt=["a", "b"])


def test_sizes_the_release_offers():
    sizes = {(1024, "1:2"): (1472, 736), (1024, "16:9"): (768, 1376), (1440, "3:4"): (1616, 1216),
             (1440, "2:1"): (1040, 2080)}  # fmt: skip
    for arguments, size in sizes.items():
        assert pipeline.offered_size(*arguments) == size


def test_output_types_and_sizes(pipe):
    arrays = pipe("cat", height=8, width=24, num_inference_steps=2, num_images_per_prompt=2, output_type="np").images
    assert arrays.shape == (2, 8, 24, 3)
    assert 0 <= arrays.min() <= arrays.max() <= 1
    images = pipe("cat", height=8, width=24, num_inference_steps=2, num_images_per_prompt=2).images
    assert images[0].size == (24, 8)
    np.testing.assert_allclose(np.asarray(images[1]) / 255, arrays[1], atol=1 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 10, "width": 16}, "size 10x16 cannot be tiled"),
        ({"height": 16}, "give both height and width"),
        ({"height": 16, "width": 16, "aspect_ratio": "1:1"}, "give either height and width, or base_resolution"),
        ({"base_resolution": 512}, "accepted: 1024, 1440"),
        ({"aspect_ratio": "5:4"}, "accepted: 1:2, 9:16"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"output_type": "jpg"}, "accepted: pil, np, latent"),
    ],
)
def test_bad_arguments(pipe, options, message):
    with pytest.raises(LensError, match=message):
        pipe("cat", **options)
    with pytest.raises(LensError, match="prompt 0 is int"):
        pipe([1])
