"""What the device is and what it gives: the yardsticks of all other figures."""

import jax
import jax.numpy as jnp

from lens_jax import flops
from lens_jax.bench import measure
from lens_jax.bench.suite.case import Case, Setting
from lens_jax.bench.suite.kinds import check_device


def cases(setting: Setting) -> list[Case]:
    check_device(setting)
    tiny = setting.size == "tiny"
    side, numbers = (256, 2**16) if tiny else (8192, 2**30)
    return [
        Case("about", _about, least=1),
        Case(f"product {side} bfloat16", lambda: _product(side), least=3, most=40),
        Case("copy", lambda: _copy(numbers), least=3, most=40),
    ]


def _about() -> dict:
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    peak = flops.peak(device.device_kind)
    return {
        **measure.machine(),
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "platform_version": device.client.platform_version,
        "memory_limit_megabytes": memory.get("bytes_limit", 0) / 1e6 or None,
        "peak_tflops_per_second": peak and peak / 1e12,
    }


def _product(side: int) -> dict:
    draw = jax.jit(lambda key: jax.random.normal(key, (side, side), jnp.bfloat16))
    a = draw(jax.random.key(0))
    product = jax.jit(lambda a: a @ a)
    # Several at a time: a single one is about as short as what it takes to start it.
    seconds = measure.medians({"product": lambda: [product(a) for _ in range(10)]}, 5)["product"] / 10
    return {"seconds": seconds, **measure.rate(2 * side**3, seconds, "bfloat16")}


def _copy(numbers: int) -> dict:
    x = jnp.zeros(numbers, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    seconds = measure.medians({"copy": lambda: add(x)}, 10)["copy"]
    return {"seconds": seconds, "gigabytes_per_second": 4 * numbers / seconds / 1e9}
