"""A run as one file: the same images as from the run, and files that are not what they say."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lens_jax import LensPipeline, cli
from lens_jax.contact_sheet import read_png_metadata
from lens_jax.convert import packed as packed_files
from lens_jax.convert import writer
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.diffusion import draw
from lens_jax.errors import LensError
from lens_jax.inference import load, packed
from lens_jax.models.lora import LoraConfig
from lens_jax.pretraining import warm_start
from lens_jax.pretraining.job import train

DRAW = {"num_inference_steps": 2, "seed": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    config = dataclasses.replace(tiny_config, out=str(tmp_path_factory.mktemp("run") / "run"), steps=4, samples=quiet)
    train(config)
    return config.out


def test_it_draws_what_the_run_draws(run, tmp_path):
    file = packed.write(run, tmp_path / "model.safetensors", "float32", num_inference_steps=7, guidance_scale=2.0)
    mine, theirs = LensPipeline.from_pretrained(file), LensPipeline.from_pretrained(run)
    assert (mine.num_inference_steps, mine.guidance_scale, mine.default_size) == (7, 2.0, theirs.default_size)
    drawn = [pipe("red apple", guidance_scale=3.0, **DRAW).images for pipe in (mine, theirs)]
    np.testing.assert_array_equal(*drawn)
    half = packed.write(run, tmp_path / "half.safetensors")
    assert half.stat().st_size < 0.7 * file.stat().st_size
    pipe = LensPipeline.from_pretrained(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe.params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(pipe("red apple", guidance_scale=3.0, **DRAW).images, drawn[0], atol=0.02)


def test_files_that_are_not_what_they_say(run, tmp_path):
    file = packed.write(run, tmp_path / "model.safetensors")
    whole = SafetensorsFile(file)
    described = json.loads(whole.metadata[packed_files.KEY])
    for changes, tensors, words in (
        ({"format": 9}, {}, "packed in format 9; this version reads 1 and 2"),
        ({"model": {"layers": "two"}}, {}, "model.layers"),
        ({}, {"denoiser/extra": np.zeros(3, np.float32)}, "denoiser/extra is not of this model"),
        ({}, {"codec/mean": np.zeros(5, np.float32)}, r"codec/mean is \[5\] and should be \[48\]"),
    ):
        other = tmp_path / "other.safetensors"
        writer.write_file(
            other, {**whole, **tensors}, metadata={packed_files.KEY: json.dumps({**described, **changes})}
        )
        with pytest.raises(LensError, match=words):
            load.from_pretrained(other)
    writer.write_file(other, dict(whole), metadata={packed_files.KEY: "{"})
    with pytest.raises(LensError, match="not a JSON object"):
        load.from_pretrained(other)
    with pytest.raises(LensError, match=r"variant .*is no option of a packed model"):
        load.from_pretrained(file, variant="turbo")


@pytest.fixture
def shipped(run, tmp_path, monkeypatch):
    """The run as a model that comes with the package, and as its variant of few steps."""
    files = {"base.safetensors": (7, 2.0), "turbo.safetensors": (4, 1.0)}
    for name, (steps, guidance) in files.items():
        packed.write(run, tmp_path / name, num_inference_steps=steps, guidance_scale=guidance)
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in files}
    (tmp_path / packed_files.DIGESTS).write_text(json.dumps(digests))
    monkeypatch.setattr(packed_files, "SHIPPED", tmp_path)
    monkeypatch.chdir(tmp_path)  # where nothing is called "small"
    return tmp_path


def test_variants_of_a_shipped_model(shipped):
    settings = lambda **options: (lambda pipe: (pipe.num_inference_steps, pipe.guidance_scale))(
        LensPipeline.from_pretrained("small", **options)
    )
    assert settings() == settings(variant=None) == settings(variant="base") == (7, 2.0)
    assert settings(variant="turbo", dtype="float32") == (4, 1.0)
    # A path to a model, where an option has no variant beside it.
    named = lambda name, **options: LensPipeline.from_pretrained(name, **options).num_inference_steps
    assert (named("small/base"), named("small/turbo"), named("small/turbo", variant="turbo")) == (7, 4, 4)
    with pytest.raises(LensError, match="small/turbo: its variant is 'turbo', and 'base' is asked for"):
        named("small/turbo", variant="base")
    with pytest.raises(LensError, match=r"small: comes without a variant '\.\./base'"):
        named("small/../base")
    for variant in ("lens", "../base", "", 4):
        with pytest.raises(LensError, match=r"small: comes without a variant .*; accepted: base, turbo"):
            LensPipeline.from_pretrained("small", variant=variant)
    (shipped / "turbo.safetensors").write_bytes(b"not the model")
    with pytest.raises(LensError, match=r"turbo.safetensors: is damaged"):
        LensPipeline.from_pretrained("small", variant="turbo")


def test_the_variant_of_few_steps_is_drawn_by_its_name_alone(shipped, capsys):
    """Of the command line: one pass through the network a step, and a PNG that says how it was drawn."""
    passes = []
    apply = draw.denoiser.apply

    def counted(*args, **options):
        jax.debug.callback(lambda: passes.append(1))
        return apply(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw.denoiser, "apply", counted)
        draw.draw_program.clear_cache()
        assert run_command("sample", "red apple", "--variant", "turbo", "--out", "turbo") == 0
        jax.effects_barrier()
        turbo = len(passes)
        assert run_command("sample", "red apple", "--out", "base") == 0
        jax.effects_barrier()
        draw.draw_program.clear_cache()
    assert (turbo, len(passes) - turbo) == (4, 14)
    metadata = read_png_metadata(shipped / "turbo" / "0000-red-apple.png")
    assert (metadata["variant"], metadata["num_inference_steps"], metadata["guidance_scale"]) == ("turbo", 4, 1.0)
    assert run_command("sample", "red apple", "--variant", "lens", "--out", "lens") == 2
    assert capsys.readouterr().err == (
        "lens-jax: error: small: comes without a variant 'lens'; accepted: base, turbo\n"
    )


def run_command(*argv) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    return stop.value.code


@pytest.mark.slow
def test_an_adapter_beside_its_base(run, tiny_config, tmp_path):
    """It alone is a variant: drawn with as the whole, told from another's, and a start for other runs."""
    base = packed.write(run, tmp_path / "base.safetensors")
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    config = dataclasses.replace(
        tiny_config, out=str(tmp_path / "adapter"), init_from=str(base), steps=4, samples=quiet,
        lora=LoraConfig(rank=2, targets=("attention", "mlp")),
        optimizer=dataclasses.replace(tiny_config.optimizer, learning_rate=0.1),
    )  # fmt: skip
    train(config)
    write = lambda name, **options: packed.write(config.out, tmp_path / name, "float32", beside=base, **options)
    file, merged = (
        write("lens.safetensors", guidance_scale=3.0),
        packed.write(config.out, tmp_path / "m.safetensors", "float32"),
    )
    assert file.stat().st_size < 0.3 * merged.stat().st_size
    alone, whole = LensPipeline.from_pretrained(file), LensPipeline.from_pretrained(merged)
    assert alone.guidance_scale == 3.0
    jax.tree.map(np.testing.assert_array_equal, alone.params, whole.params)
    changed = [
        a
        for a, b in zip(*map(jax.tree.leaves, (alone.params, LensPipeline.from_pretrained(base).params)))
        if (a != b).any()
    ]
    assert len(changed) == 8
    on = dataclasses.replace(tiny_config, init_from=str(file))
    started = warm_start.load(on)[0]
    np.testing.assert_array_equal(started["blocks/text/down/kernel"], alone.params["blocks"]["text"]["down"]["kernel"])

    with pytest.raises(LensError, match="must be in the folder of"):
        packed.write(config.out, tmp_path / "other" / "lens.safetensors", beside=base)
    with pytest.raises(LensError, match=r"was not trained beside .*differ"):
        packed.write(config.out, tmp_path / "x.safetensors", beside=merged)
    with pytest.raises(LensError, match="trained a denoiser and no adapter"):
        packed.write(run, tmp_path / "x.safetensors", beside=base)
    described = json.loads(SafetensorsFile(file).metadata[packed_files.KEY])
    tensors = dict(SafetensorsFile(file))
    name = "lora/blocks/image/qkv/a"
    for beside, changes, words in (
        ({"file": "../base.safetensors"}, {}, "does not say which file"),
        ({"file": ""}, {}, "does not say which file"),
        ({"file": "none.safetensors"}, {}, "none.safetensors: is not there"),
        ({"sha256": "0" * 64}, {}, "another model than the adapter"),
        ({}, {name: tensors[name][..., :1]}, r"lora/blocks/image/qkv/[ab] is .* and should be"),
        ({}, {name: np.float32(1)}, "is no half of an adapter of this model"),
        ({}, {"lora/blocks/image/norm1/a": tensors[name]}, "is no half of an adapter of this model"),
    ):  # fmt: skip
        changed = {**described, "beside": {**described["beside"], **beside}}
        bad = tmp_path / "bad.safetensors"
        writer.write_file(bad, {**tensors, **changes}, metadata={packed_files.KEY: json.dumps(changed)})
        with pytest.raises(LensError, match=words):
            load.from_pretrained(bad)
    # One beside another adds both.
    chained = {**described, "beside": {"file": file.name, "sha256": packed_files.file_digest(file)}}
    writer.write_file(tmp_path / "turbo.safetensors", tensors, metadata={packed_files.KEY: json.dumps(chained)})
    twice = LensPipeline.from_pretrained(tmp_path / "turbo.safetensors").params
    w, once, both = (
        p["blocks"]["image"]["qkv"]["kernel"] for p in (LensPipeline.from_pretrained(base).params, alone.params, twice)
    )
    np.testing.assert_allclose(both - once, once - w, atol=1e-6)
    base.unlink()
    with pytest.raises(LensError, match="is not there, and the adapter"):
        load.from_pretrained(file)


@pytest.mark.slow
def test_an_adapter_is_merged(run, tiny_config, tmp_path):
    """Of a run that trained one: the file draws what the run draws, and not what its base does."""
    quiet = dataclasses.replace(tiny_config.samples, every=0)
    # The gates of a hardly trained block are next to zero and hide what is in it; the way out has none.
    adapter = LoraConfig(rank=2, targets=("attention", "mlp", "proj_out"))
    config = dataclasses.replace(
        tiny_config, out=str(tmp_path / "adapter"), init_from=run, steps=4, samples=quiet, lora=adapter,
        ema_decay=0.0, optimizer=dataclasses.replace(tiny_config.optimizer, learning_rate=0.1),
    )  # fmt: skip
    train(config)
    file = packed.write(config.out, tmp_path / "merged.safetensors", "float32")
    pipes = [LensPipeline.from_pretrained(path) for path in (file, config.out, run)]
    drawn = [pipe("red apple", **DRAW).images for pipe in pipes]
    # W + B A is rounded once, not x W + x B A.
    assert 100 * np.abs(drawn[0] - drawn[1]).max() < np.abs(drawn[0] - drawn[2]).max()

    # Each kernel by itself, since some hardly show in an image: W + B A, and all else as it was.
    merged, base = (flatten_dict(pipe.params, sep="/") for pipe in (pipes[0], pipes[2]))
    (loaded,) = pipes[1].adapters
    factors = flatten_dict(loaded.tree, sep="/")
    layers = {path.rpartition("/")[0] for path in factors}
    assert {"blocks/image/qkv", "blocks/text/gate_up", "blocks/image/down", "image_out"} <= layers
    for path, kernel in merged.items():
        layer, _, name = path.rpartition("/")
        if layer not in layers or name != "kernel":
            np.testing.assert_array_equal(kernel, base[path])
            continue
        a, b = (np.asarray(factors[f"{layer}/{part}"], np.float64) * (1, loaded.scale)[part == "b"] for part in "ab")
        one = (lambda a, b: np.einsum("wpr,prh->wph", a, b)) if layer.endswith("/gate_up") else _tensordot
        change = np.stack([one(*pair) for pair in zip(a, b)]) if layer.startswith("blocks/") else one(a, b)
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(kernel, base[path] + change, atol=1e-6 * np.abs(kernel).max())


def _tensordot(a, b):
    return np.tensordot(a, b, 1)


def test_a_shipped_model_that_was_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_files, "SHIPPED", tmp_path)
    with pytest.raises(LensError, match="the model that comes with the package"):
        packed_files.shipped("small")
    (tmp_path / "base.safetensors").write_bytes(b"not the model")
    (tmp_path / "digests.json").write_text(json.dumps({"base.safetensors": "0" * 64}))
    with pytest.raises(LensError, match="is damaged"):
        packed_files.shipped("small")


def test_all_that_is_shipped():
    """Every variant is what its digest says and fits what it stands beside; no other file of weights is there."""
    digests = json.loads((packed_files.SHIPPED / packed_files.DIGESTS).read_text())
    assert {file.name for file in packed_files.SHIPPED.glob("*.safetensors")} == digests.keys()
    for name in digests:
        file = packed_files.PackedFile(packed_files.shipped("small", name.removesuffix(".safetensors")))
        assert file.shapes("denoiser")["blocks/image/qkv/kernel"] == (5, 192, 3, 3, 64)
