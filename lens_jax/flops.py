"""Exact operation counts. XLA's own count sees a scanned block once, and 6 x parameters is 2x too high for Lens."""

from lens_jax.models.denoiser import DenoiserConfig


def denoiser_forward(config: DenoiserConfig, image_tokens: int, text_tokens: int) -> int:
    """Operations of one forward pass of one sample, 2 a multiply-add; norms, rotations and products excluded.

    A third of the parameters are modulation, applied once a sample, and each token passes one stream only.
    """
    width, hidden = config.width, config.hidden
    tokens = image_tokens + text_tokens
    linear = 2 * (4 * width**2 + 3 * width * hidden) * tokens
    attention = 4 * tokens**2 * width
    modulation = 2 * 2 * 6 * width**2
    image_in_out = 2 * 2 * config.latent_channels * width * image_tokens
    text_in = 2 * config.text_layers * config.text_width * width * text_tokens
    time_and_out = 2 * (256 * width + width**2) + 2 * 2 * width**2
    return config.layers * (linear + attention + modulation) + image_in_out + text_in + time_and_out


def train_step(config: DenoiserConfig, image_tokens: int, text_tokens: int, batch: int) -> int:
    """Model operations of one optimiser step: the backward pass costs twice the forward one; no recomputation."""
    return 3 * batch * denoiser_forward(config, image_tokens, text_tokens)


# Dense bfloat16 operations a second, by a part of the device's name in lower case (makers' data sheets).
_PEAKS = {
    "h100 pcie": 756e12,
    "h100": 989.4e12,
    "h200": 989.4e12,
    "h800": 989.4e12,
    "a100": 312e12,
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v5p": 459e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v4": 275e12,
}


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device in operations a second, or None for one that is not listed."""
    name = device_kind.lower()
    return next((rate for part, rate in _PEAKS.items() if part in name), None)
