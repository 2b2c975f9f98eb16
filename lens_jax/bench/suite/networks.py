"""The networks one by one and together, forward: the other benchmarks at the sizes that were asked about."""

import functools
from collections.abc import Callable

from lens_jax.bench import denoiser, sample, text
from lens_jax.bench.decode import DecodeBench, bench_decode
from lens_jax.bench.denoiser import DenoiserBench, bench_denoiser
from lens_jax.bench.sample import SampleBench, bench_sample
from lens_jax.bench.suite.case import Case, Setting
from lens_jax.bench.suite.kinds import check_device, kernel_here
from lens_jax.bench.text import TextBench, bench_text

# (pixels of a side, images at a time, the kernel of the device or XLA's).
_DENOISER = ((1024, 1, "auto"), (1024, 1, "xla"), (512, 1, "auto"), (1024, 4, "auto"))
_DENOISER_MORE = ((512, 4, "auto"), (1024, 2, "auto"), (512, 2, "auto"), (512, 1, "xla"), (1024, 4, "xla"),
                  (512, 4, "xla"), (1024, 2, "xla"), (512, 2, "xla"))  # fmt: skip
# Tokens of a prompt as the report's captions have them.
TEXT_TOKENS = 150


def cases(setting: Setting) -> list[Case]:
    check_device(setting)
    makers: dict[str, Callable[[bool], list[Case]]] = {
        "denoiser": functools.partial(_denoiser, _DENOISER),
        "denoiser_more": functools.partial(_denoiser, _DENOISER_MORE),
        "sample": _sample,
        "text": _text,
        "autoencoder": _autoencoder,
    }
    return makers[setting.part](setting.size == "tiny")


def _denoiser(wanted, tiny: bool) -> list[Case]:
    @functools.cache
    def params():
        return denoiser.random_params(denoiser.denoiser_config(DenoiserBench(size="tiny" if tiny else "lens")))

    def case(side: int, images: int, kernel: str) -> Case:
        options = {"size": "lens", "height": side, "width": side, "text_tokens": TEXT_TOKENS}
        if tiny:
            options = {"size": "tiny", "height": side // 16, "width": side // 16, "text_tokens": 5, "repeats": 2}
        bench = DenoiserBench(batch_size=images, attention=kernel, **options)
        name = f"{bench.height}x{bench.width}, {images} at a time, {kernel_here(kernel, bench.dtype)}"
        return Case(name, lambda: bench_denoiser(bench, params()), least=8, most=75)

    return [case(*one) for one in (wanted[:1] if tiny else wanted)]


def _sample(tiny: bool) -> list[Case]:
    options = {"size": "lens", "text_tokens": TEXT_TOKENS, "repeats": 5}
    if tiny:
        options = {"size": "tiny", "height": 64, "width": 64, "text_tokens": 8, "repeats": 1}

    @functools.cache
    def pipeline():
        return sample.random_pipeline(SampleBench(**options))

    def case(steps: int, guidance: float) -> Case:
        bench = SampleBench(num_inference_steps=steps, guidance_scale=guidance, **options)

        def run() -> dict:
            result = bench_sample(bench, pipeline())
            shares = {share: result[f"denoise_{share}"] for share in ("mfu", "hfu") if f"denoise_{share}" in result}
            return {"seconds": result["end_to_end_seconds"], **shares, **result}

        return Case(f"{steps} steps, guidance {guidance:g}", run, least=10 if tiny else 20, most=150)

    return [case(20 if not tiny else 3, 5.0), case(4 if not tiny else 2, 1.0)]


def _text(tiny: bool) -> list[Case]:
    size = "tiny" if tiny else "lens"

    @functools.cache
    def params():
        return text.random_params(text.text_config(TextBench(size=size)), head=True)

    def case(prompts: int, new_tokens: int) -> Case:
        tokens, repeats = (8, 1) if tiny else (TEXT_TOKENS, 5)
        options = {"size": size, "tokens": tokens, "batch_size": prompts, "repeats": repeats}
        if new_tokens:
            bench, what = TextBench(new_tokens=new_tokens, **options), f"{new_tokens} written behind"
        else:
            bench, what = TextBench(prefix=5 if tiny else 97, **options), "features of"
        name = f"{what} {prompts} of {tokens} tokens"
        return Case(name, lambda: bench_text(bench, params()), least=10, most=75)

    if tiny:
        return [case(2, 0), case(1, 4)]
    return [case(1, 0), case(1, 64), case(8, 0), case(8, 64)]


def _autoencoder(tiny: bool) -> list[Case]:
    size, side, repeats = ("tiny", 32, 1) if tiny else ("lens", 1024, 5)

    def case(encode: bool) -> Case:
        bench = DecodeBench(size=size, height=side, width=side, encode=encode, repeats=repeats)
        return Case("encode" if encode else "decode", lambda: bench_decode(bench), least=8, most=60)

    return [case(False), case(True)]
