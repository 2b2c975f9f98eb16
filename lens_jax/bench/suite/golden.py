"""The tiny release against its golden on this device, in float32 and bfloat16; without the file, against the CPU."""

import functools
from pathlib import Path

import jax
import numpy as np

import lens_jax
from lens_jax.bench import sample
from lens_jax.bench.distance import relative_distance
from lens_jax.bench.sample import SampleBench
from lens_jax.bench.suite.case import Case, Setting
from lens_jax.bench.suite.kinds import check_device
from lens_jax.convert.safetensors import SafetensorsFile
from lens_jax.encoders.gpt_oss import encode_tokens
from lens_jax.encoders.text import TextFeatures
from lens_jax.inference.pipeline import LensPipeline

# By dtype and matrix precision: how far final latents and image in [0, 1] may be. On a CPU it is 1e-6 and 1e-5 in
# float32, 0.012 and 0.011 in bfloat16 (docs/checkpoints.md); GPUs round the inputs of float32 products to TF32, of 10
# bits, unless told otherwise.
_PRECISIONS = {
    ("float32", "highest"): (1e-4, 3e-4),
    ("float32", "default"): (1e-2, 1e-2),
    ("bfloat16", "default"): (0.03, 0.03),
}


def cases(setting: Setting) -> list[Case]:
    check_device(setting)
    folder = _find(setting.golden)
    run = _against_golden if folder else _against_cpu
    made = lambda dtype, precision: Case(
        f"{dtype}, {precision} precision", functools.partial(run, folder, dtype, precision), least=8, most=60
    )
    wanted = list(_PRECISIONS)
    if setting.size == "tiny":
        # A CPU has one precision of float32.
        wanted.remove(("float32", "default"))
    if not folder:
        # Random weights are others in another dtype: without the file bfloat16 has nothing to be compared with.
        wanted = [key for key in wanted if key[0] == "float32"]
    return [made(*key) for key in wanted]


def _find(given: str) -> Path | None:
    source, here = Path(lens_jax.__file__).parents[1], Path.cwd()
    folders = [Path(given)] if given else [root / "tests" / "goldens" / "tiny_release" for root in (source, here)]
    return next((folder for folder in folders if (folder / "golden_io.safetensors").is_file()), None)


def _against_golden(folder: Path, dtype: str, precision: str) -> dict:
    golden = SafetensorsFile(folder / "golden_io.safetensors")
    with jax.default_matmul_precision(precision):
        pipe = LensPipeline.from_pretrained(folder, dtype=dtype)
        latents, image = (_draw(pipe, golden, kind) for kind in ("latent", "np"))
    expected = np.clip(golden["image"], -1, 1).transpose(0, 2, 3, 1) / 2 + 0.5
    errors = relative_distance(latents, golden["final_latents"]), relative_distance(image, expected)
    return _judged(errors, dtype, precision, str(folder))


def _draw(pipe: LensPipeline, golden: SafetensorsFile, output_type: str) -> np.ndarray:
    """What the golden drew: its token ids, its noise, its schedule and guidance."""
    lengths, drop = golden["attention_mask"].sum(1), int(golden["text_offset"])
    encoder = pipe.text_encoder
    layers = encode_tokens(
        encoder.model, encoder.params, golden["input_ids"], lengths, encoder.config.selected, drop=drop
    )
    rows, columns = (int(n) for n in golden["latent_hw"])
    return pipe(
        prompt_embeds=TextFeatures(tuple(layers), lengths - drop),
        latents=golden["initial_latents"],
        height=rows * pipe.codec.tile,
        width=columns * pipe.codec.tile,
        num_inference_steps=int(golden["num_steps"]),
        guidance_scale=float(golden["guidance_scale"]),
        output_type=output_type,
    ).images


def _against_cpu(_: None, dtype: str, precision: str) -> dict:
    """The whole system at tiny sizes with the same random weights, on this device and on the CPU."""
    bench = SampleBench(size="tiny", height=64, width=96, dtype=dtype, attention="xla")
    ids = np.random.default_rng(0).integers(0, 1000, (2, 11))

    def draw(pipe: LensPipeline, kind: str) -> np.ndarray:
        features = sample.encode(pipe.text_encoder, ids, None)
        return pipe(prompt_embeds=features, height=64, width=96, num_inference_steps=4, output_type=kind).images

    with jax.default_matmul_precision(precision):
        pipe = sample.random_pipeline(bench)
        found = [draw(pipe, kind) for kind in ("latent", "np")]
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), jax.default_matmul_precision("highest"):
        for name in ("params", "codec_params"):
            setattr(pipe, name, jax.device_put(getattr(pipe, name), cpu))
        pipe.text_encoder.params = jax.device_put(pipe.text_encoder.params, cpu)
        expected = [draw(pipe, kind) for kind in ("latent", "np")]
    errors = [relative_distance(*pair) for pair in zip(found, expected)]
    return _judged(errors, dtype, precision, "none: the CPU of this machine")


def _judged(errors, dtype: str, precision: str, golden: str) -> dict:
    allowed = _PRECISIONS[dtype, precision]
    return {
        "golden": golden,
        "latents_error": errors[0],
        "image_error": errors[1],
        "allowed": allowed,
        "equal": all(error <= most for error, most in zip(errors, allowed)),
    }
