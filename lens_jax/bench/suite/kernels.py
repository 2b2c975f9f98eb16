"""Whether the attention kernel of this device gives what XLA's does, both ways, with lengths, at odd sizes."""

from lens_jax.bench.attention import AttentionBench, bench_attention
from lens_jax.bench.suite.case import Case, Setting
from lens_jax.bench.suite.kinds import check_device


def cases(setting: Setting) -> list[Case]:
    check_device(setting)
    shapes = {
        "1024x1024, a row without text": {"image_tokens": 4096, "text_tokens": 150, "lengths": (150, 0)},
        "odd sizes": {"image_tokens": 1537, "text_tokens": 61, "lengths": (61, 0, 17, 1)},
        "padded image tokens": {"image_tokens": 1200, "text_tokens": 77, "lengths": (77, 13), "valid_image": 1111},
        "no text at all": {"image_tokens": 1024, "text_tokens": 0, "lengths": ()},
        "few tokens": {"image_tokens": 24, "text_tokens": 11, "lengths": (11, 3)},
    }
    if setting.size == "tiny":
        small = {"image_tokens": 37, "text_tokens": 9, "heads": 2, "head_dim": 16, "repeats": 2}
        shapes = {
            "a row without text": {**small, "lengths": (9, 0)},
            "padded image tokens": {**small, "lengths": (9, 4), "valid_image": 30},
        }
    run = lambda shape: lambda: bench_attention(AttentionBench(**shape))
    return [Case(name, run(shape), least=8, most=60) for name, shape in shapes.items()]
