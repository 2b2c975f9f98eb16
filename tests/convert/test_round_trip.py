"""PyTorch -> JAX -> PyTorch: the same bytes; and every tensor of the release has its place in a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.convert import autoencoder, denoiser, folder, table, writer
from lens_jax.errors import LensError
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import LENS

COMPONENTS = {"transformer": denoiser, "vae": autoencoder}
FILE = "diffusion_pytorch_model.safetensors"


def load(path, component):
    convert = COMPONENTS[component]
    config = convert.read_config(path / component / "config.json", dtype="float32")
    return convert, config, folder.open_component(path / component)


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert actual[name].shape == expected[name].shape, name
        assert actual[name].tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_written_file_is_the_file_that_was_read(goldens, tmp_path, component):
    convert, config, tensors = load(goldens / "tiny_release", component)
    params = convert.from_release(config, tensors, component)
    # Through the arrays of JAX, as a trained model would come.
    params = jax.tree.map(jnp.asarray, params)
    assert writer.write_folder(tmp_path, convert.to_release(config, params)) == [FILE]
    assert_same(folder.open_component(tmp_path), tensors)
    assert (tmp_path / FILE).read_bytes() == (goldens / "tiny_release" / component / FILE).read_bytes()


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_config_goes_there_and_back(goldens, component):
    convert, config, _ = load(goldens / "tiny_release", component)
    taps = {"text_taps": (1, 2, 4, 5)} if component == "transformer" else {}
    values = convert.config_to_release(config, **taps)
    assert convert.config_from_release(values, "config.json", dtype="float32") == config
    original = folder.read_json(goldens / "tiny_release" / component / "config.json")
    for key in original.keys() & values.keys() - {"_diffusers_version", "sample_size"}:
        assert values[key] == original[key], key


def test_every_tensor_of_the_release_has_its_place(goldens):
    lines = (goldens / "release_tensors.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    types = {"F32": np.dtype(np.float32), "I64": np.dtype(np.int64)}
    for component, config in (("transformer", LENS), ("vae", AutoencoderConfig())):
        convert = COMPONENTS[component]
        expected = [(name, dtype, shape) for part, name, dtype, shape in rows if part == component]
        specs = table.to_release(convert.rules(config), convert.template(config)).specs
        # The order too: it decides which shard a tensor is in.
        assert [(n, s.dtype, str(list(s.shape))) for n, s in specs.items()] == [
            (n, types[d], s) for n, d, s in expected
        ]
        table.check(convert.rules(config), specs, "release")
        # Every leaf is filled, and every element once.
        filled = dict.fromkeys(convert.template(config), 0)
        for rule in convert.rules(config):
            filled[rule.path] += int(np.prod(rule.shape))
        assert filled == {path: leaf.size for path, leaf in convert.template(config).items()}


def test_shards_of_the_released_denoiser():
    specs = table.to_release(denoiser.rules(LENS), denoiser.template(LENS)).specs
    shards = writer.plan_shards(specs)
    sizes = [sum(specs[name].bytes for name in shard) for shard in shards]
    assert sizes == [9_996_033_024, 6_420_867_584]
    assert shards[0][-1] == "transformer_blocks.29.attn.txt_qkv.bias"
    half = table.to_release(denoiser.rules(LENS), denoiser.template(LENS), np.dtype(jnp.bfloat16)).specs
    assert len(writer.plan_shards(half)) == 1


@pytest.mark.parametrize("component", COMPONENTS)
def test_bfloat16_is_a_rounding_and_then_exact(goldens, component):
    convert, config, tensors = load(goldens / "tiny_release", component)
    params = convert.from_release(config, tensors, component)
    half = dict(convert.to_release(config, params, np.dtype(jnp.bfloat16)))
    again = convert.to_release(config, convert.from_release(config, half, "half"), np.dtype(jnp.bfloat16))
    assert_same(again, half)
    kept = {"bn.running_mean": np.float32, "bn.running_var": np.float32, "bn.num_batches_tracked": np.int64}
    for name, array in half.items():
        assert array.dtype == kept.get(name, jnp.bfloat16)
        assert np.array_equal(array, tensors[name].astype(array.dtype))


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "module.net."]
)
def test_prefixes_and_bundles(goldens, prefix):
    convert, config, tensors = load(goldens / "tiny_release", "transformer")
    bundle = {prefix + name: tensors[name] for name in tensors}
    bundle["first_stage_model.bn.running_mean"] = bundle["text_encoders.gpt_oss.norm"] = np.zeros(3, np.float32)
    actual = convert.to_release(config, convert.from_release(config, bundle, "bundle"))
    assert_same(actual, tensors)
    bundle["stranger"] = np.zeros(3, np.float32)
    with pytest.raises(LensError, match="stranger is not expected"):
        convert.from_release(config, bundle, "bundle")


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_autoencoder_by_its_ldm_names(goldens, prefix):
    """Names written out by hand here, so that the table is not compared with itself."""
    convert, config, tensors = load(goldens / "tiny_release", "vae")
    rename = {
        "encoder.down_blocks.2.resnets.0.conv_shortcut.weight": "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.down_blocks.1.downsamplers.0.conv.bias": "encoder.down.1.downsample.conv.bias",
        "decoder.up_blocks.0.upsamplers.0.conv.weight": "decoder.up.3.upsample.conv.weight",
        "decoder.up_blocks.3.resnets.2.norm1.weight": "decoder.up.0.block.2.norm1.weight",
        "decoder.mid_block.resnets.1.conv1.weight": "decoder.mid.block_2.conv1.weight",
        "encoder.mid_block.attentions.0.group_norm.bias": "encoder.mid.attn_1.norm.bias",
        "encoder.mid_block.attentions.0.to_q.weight": "encoder.mid.attn_1.q.weight",
        "decoder.mid_block.attentions.0.to_out.0.weight": "decoder.mid.attn_1.proj_out.weight",
        "decoder.conv_norm_out.bias": "decoder.norm_out.bias",
        "quant_conv.weight": "encoder.quant_conv.weight",
        "post_quant_conv.bias": "decoder.post_quant_conv.bias",
        "encoder.conv_in.weight": "encoder.conv_in.weight",
    }
    pairs = dict(zip((r.name for r in convert.rules(config)), (r.name for r in convert.rules(config, ldm=True))))
    for theirs, ldm in rename.items():
        assert pairs[theirs] == ldm
    bundle = {}
    for name in tensors:
        array = tensors[name]
        if ".attentions.0.to_" in name and array.ndim == 2:
            array = array[:, :, None, None]
        if name != "bn.num_batches_tracked":
            bundle[prefix + pairs[name]] = array
    params = convert.from_release(config, bundle, "ae.safetensors")
    assert_same(convert.to_release(config, params), tensors)


def test_everything_wrong_is_said_at_once(goldens):
    convert, config, tensors = load(goldens / "tiny_release", "vae")
    broken = dict(tensors)
    broken["encoder.conv_im.weight"] = broken.pop("encoder.conv_in.weight")
    broken["quant_conv.bias"] = broken["quant_conv.bias"][:3]
    broken["bn.running_var"] = broken["bn.running_var"].astype(np.int32)
    with pytest.raises(LensError) as error:
        convert.from_release(config, broken, "ae.safetensors")
    for part in (
        "ae.safetensors: 4 of 247 tensors do not fit",
        "encoder.conv_in.weight is missing (did you mean 'encoder.conv_im.weight'?)",
        "encoder.conv_im.weight is not expected",
        "quant_conv.bias is [3], expected [64]",
        "bn.running_var is int32, accepted: float32",
    ):
        assert part in str(error.value)
    with pytest.raises(LensError, match=r"'two\\nlines' is not expected"):
        convert.from_release(config, {**tensors, "two\nlines": np.zeros(1)}, "ae.safetensors")
    broken = {**tensors, "bn.num_batches_tracked": np.array(2**40)}
    with pytest.raises(LensError, match="num_batches_tracked is 1099511627776; accepted: 0 to"):
        convert.from_release(config, broken, "ae.safetensors")


def test_leaves_come_one_at_a_time(goldens):
    """A leaf is made when it is asked for, from the tensors of that leaf alone."""
    convert, config, tensors = load(goldens / "tiny_release", "transformer")
    asked = []
    counting = table.Tensors(tensors.specs, lambda name: (asked.append(name), tensors[name])[1])
    leaves = iter(convert.leaves(config, counting, "counting").items())
    assert asked == []
    path, leaf = next(leaves)
    rules = {rule.name for rule in convert.rules(config) if rule.path == path}
    assert set(asked) == rules
    assert leaf.dtype == np.float32
    assert len(asked) + sum(1 for _ in leaves) < len(tensors)
    assert len(asked) == len(tensors)


def test_transposed_matrices_of_any_size_are_copied_right():
    """The blocked copy, against plain indexing, at sizes around its block and into strided parts."""
    rng = np.random.default_rng(0)
    for out, inputs in ((3, 5), (16, 64), (17, 65), (96, 130)):
        weight = rng.standard_normal((out, 3 * inputs), np.float32)
        rule = table.Rule("w", weight.shape, "k", (1, slice(None), 0), table.linear, table.linear_back)
        template = {"k": jax.ShapeDtypeStruct((2, 3 * inputs, 2, out), jnp.bfloat16)}
        ((_, leaf),) = table.leaves([rule], {"w": weight}, template).items()
        assert np.array_equal(leaf[1, :, 0], weight.T.astype(jnp.bfloat16))
        back = table.to_release([rule], {"k": leaf}, np.dtype(np.float32))["w"]
        assert np.array_equal(back, weight.astype(jnp.bfloat16).astype(np.float32))
        heads = table.Rule("w", weight.shape, "k", (), table.linear, table.linear_back)
        template = {"k": jax.ShapeDtypeStruct((3 * inputs, out, 1), np.float32)}
        ((_, leaf),) = table.leaves([heads], {"w": weight}, template).items()
        assert np.array_equal(leaf[..., 0], weight.T)
