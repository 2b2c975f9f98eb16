"""The scene benchmark: its prompts, its figures, and a whole run with a model whose images are right or mirrored."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lens_jax.checker.classifier import fit_classifier
from lens_jax.checker.tasks import TASKS, bench_prompts
from lens_jax.data import captions, scene_sampler, scenes
from lens_jax.data.buckets import Bucket
from lens_jax.errors import LensError
from lens_jax.evaluation import drawing, scene_bench
from lens_jax.evaluation.config import EvaluateConfig

BUCKETS = (Bucket(64, 64), Bucket(64, 80))


def test_prompts_are_held_out_and_follow_from_the_seed(concepts):
    prompts = bench_prompts(concepts, BUCKETS, list(TASKS), 2, 0)
    assert len(prompts) == len(TASKS) * len(BUCKETS) * 2
    assert all(scene_sampler.held_out(one.scene) == one.held_out for one in prompts)
    assert all(one.held_out for one in prompts if one.task != "attribution")
    assert prompts == bench_prompts(concepts, BUCKETS, list(TASKS), 2, 0)
    of = lambda task, some: [one for one in some if one.task == task]
    assert of("size", prompts) == bench_prompts(concepts, BUCKETS, ["size"], 2, 0)
    assert of("size", prompts) != bench_prompts(concepts, BUCKETS, ["size"], 2, 1)
    assert {len(one.scene.objects) for one in of("count_3", prompts)} == {3}
    assert all(one.scene.objects[0].size for one in of("size", prompts))


def test_wilsons_interval():
    """Against the values of Brown, Cai and DasGupta's formula worked by hand for 0 of 10 and 9 of 10."""
    assert scene_bench.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-4)
    assert scene_bench.wilson(9, 10) == pytest.approx((0.59585, 0.98213), abs=1e-4)


class TrueModel:
    """Draws the scene of each prompt, and mirrored where the prompt says "left"; a brief prompt's images are alike."""

    num_inference_steps, guidance_scale = 4, 1.0

    def __init__(self, prompts, sprite):
        caption = lambda scene, density: (str(scene.bucket), captions.caption(scene, "de", density))
        self.scenes = {caption(p.scene, density): p.scene for p in prompts for density in ("brief", "dense")}
        self.brief = {captions.caption(p.scene, "de", "brief") for p in prompts}
        self.sprite, self.given = sprite, []

    def __call__(self, prompts, height, width, progress, num_images_per_prompt=1, **options):
        self.given.append(options)
        images = []
        for prompt in prompts:
            pixels = scenes.draw(self.scenes[str(Bucket(height, width)), prompt], self.sprite)
            pixels = np.ascontiguousarray(pixels[:, ::-1]) if "links" in prompt else pixels
            step = 0 if prompt in self.brief else 3
            images += [Image.fromarray(np.roll(pixels, step * i, axis=1)) for i in range(num_images_per_prompt)]
        progress(len(images), len(images))
        return SimpleNamespace(images=images)


def test_a_run_measures_what_the_model_does(tmp_path, monkeypatch, concepts, sprite):
    config = EvaluateConfig(
        bench="scenes", languages=("de",), sizes=("64x64", "64x80"), tasks=("count_3", "two", "text_3"), count=3,
        diversity_prompts=5, diversity_images=2, out=str(tmp_path),
    )  # fmt: skip
    model = TrueModel(bench_prompts(concepts, BUCKETS, config.tasks, 3, 0), sprite)
    monkeypatch.setattr(drawing.LensPipeline, "from_pretrained", lambda path: model)
    monkeypatch.setattr(scene_bench, "fit_classifier", functools.partial(fit_classifier, copies=2))
    judged = scene_bench.run(config)
    assert len(judged) == 18
    for one in judged:
        assert one.right == ("links" not in one.caption), one.caption
    report = json.loads((tmp_path / "scenes.json").read_text())
    mirrored = sum("links" in one.caption for one in judged)
    assert mirrored > 0
    assert report["scores"]["all"]["right"] == 18 - mirrored
    assert report["scores"]["task"]["count_3"]["share"] == report["scores"]["task"]["text_3"]["share"] == 1
    page = (tmp_path / "scenes.html").read_text()
    assert page.count("data:image/png;base64,") == 18
    assert 0 < page.index("Not as asked") < page.index("links") < page.index("As asked")
    assert Image.open(tmp_path / "scenes.png").size[0] > 0
    # Drawn as the model itself draws, and the report says how.
    assert all(options.keys() == {"seed"} for options in model.given)
    assert report["drawn_with"] == {"num_inference_steps": 4, "guidance_scale": 1.0, "network_passes": 4}
    assert report["diversity"]["brief"]["mean"] == 0 < report["diversity"]["dense"]["mean"] < 1
    assert len(report["diversity"]["dense"]["by_prompt"]) == 5


def test_what_it_is_told_is_what_it_draws_with(monkeypatch):
    pipe = SimpleNamespace(num_inference_steps=20, guidance_scale=2.5, batch_size=1)
    monkeypatch.setattr(drawing.LensPipeline, "from_pretrained", lambda path: pipe)
    drawing.open_pipeline(EvaluateConfig(batch_size=7))
    assert drawing.drawn_with(pipe) == {"num_inference_steps": 20, "guidance_scale": 2.5, "network_passes": 40}
    drawing.open_pipeline(EvaluateConfig(num_inference_steps=4, guidance_scale=1.0))
    assert drawing.drawn_with(pipe) == {"num_inference_steps": 4, "guidance_scale": 1.0, "network_passes": 4}
    assert pipe.batch_size == 64
    asked = []
    monkeypatch.setattr(drawing.LensPipeline, "from_pretrained", lambda path, **options: asked.append(options) or pipe)
    drawing.open_pipeline(EvaluateConfig(variant="turbo"))
    drawing.open_pipeline(EvaluateConfig(ema=False))
    assert asked == [{"variant": "turbo"}, {"part": "params"}]
    with pytest.raises(LensError, match="num_inference_steps is 0"):
        drawing.open_pipeline(EvaluateConfig(num_inference_steps=0))


def test_a_task_that_is_none_is_refused(tmp_path):
    with pytest.raises(LensError, match=r"--tasks 'count_9'.*accepted: single, two"):
        scene_bench.run(EvaluateConfig(bench="scenes", tasks=("count_9",), out=str(tmp_path)))


def test_a_task_that_few_concepts_do_not_make(pictograms, tmp_path):
    """Eight concepts have no two that differ in colour alone."""
    few = EvaluateConfig(bench="scenes", data=str(pictograms), tasks=("attribution",), out=str(tmp_path))
    assert few.checkpoint == "small"
    with pytest.raises(LensError, match=r"--tasks attribution: needs 2 of red_apple, .*; the data set has 8 concepts"):
        scene_bench.run(few)
    with pytest.raises(LensError, match="--seed is -1"):
        EvaluateConfig(seed=-1)


def test_the_second_opinion_knows_what_it_was_fitted_on_and_more(concepts, sprite):
    few = concepts[:12]
    classifier = fit_classifier(few, sprite, 10)
    rng = np.random.default_rng(5)
    true = [scene_sampler.sample_scene(rng, few, BUCKETS[0], "all", "one") for _ in range(20)]
    images = [scenes.draw(scene, sprite) for scene in true]
    assert sum(classifier.agrees(scene, image) for scene, image in zip(true, images)) >= 18
    others = [images[-1], *images[:-1]]
    same = sum(a.objects[0].concept == b.objects[0].concept for a, b in zip(true, [true[-1], *true[:-1]]))
    assert sum(classifier.agrees(scene, image) for scene, image in zip(true, others)) <= same + 2
