"""Exact operation counts. XLA's own count sees a scanned block once, and 6 x parameters is 2x too high for Lens."""

from flax.traverse_util import flatten_dict

from lens_jax.models import denoiser, lora
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.eva import EvaConfig
from lens_jax.models.gpt_oss import GptOssConfig
from lens_jax.models.lora import LoraConfig
from lens_jax.models.vit import VitConfig


def denoiser_forward(config: DenoiserConfig, image_tokens: int, text_tokens: int) -> int:
    """Operations of one forward pass of one sample, 2 a multiply-add; norms, rotations and products excluded.

    A third of the parameters are modulation, applied once a sample, and each token passes one stream only.
    """
    width = config.width
    image_in_out = 2 * 2 * config.latent_channels * width * image_tokens
    text_in = 2 * config.text_layers * config.text_width * width * text_tokens
    time_and_out = 2 * (256 * width + width**2) + 2 * 2 * width**2
    return (
        config.layers * sum(_block(config, image_tokens + text_tokens).values()) + image_in_out + text_in + time_and_out
    )


def _block(config: DenoiserConfig, tokens: int) -> dict[str, int]:
    """Operations of one block and sample, by the name that the result has in the denoiser."""
    width, hidden = config.width, config.hidden
    return {
        # Once a sample, for both streams.
        "modulation": 2 * 2 * 6 * width**2,
        "qkv": 2 * 3 * width**2 * tokens,
        "attention": 4 * tokens**2 * width,
        "out": 2 * width**2 * tokens,
        "gate_up": 2 * 2 * width * hidden * tokens,
        "down": 2 * width * hidden * tokens,
    }


def train_step(
    config: DenoiserConfig, image_tokens: int, text_tokens: int, batch: int, adapter: LoraConfig = lora.OFF
) -> int:
    """Model operations of one optimiser step: the backward pass costs twice the forward one; no recomputation.

    Of an adapter's step it costs the products of the blocks once, for their inputs, attention's twice, and the
    adapter's twice. What conditions on the noise level has no gradient then, and neither have the ways in.
    """
    forward = denoiser_forward(config, image_tokens, text_tokens)
    if not adapter.rank:
        return 3 * batch * forward
    backward = input_backward(config, image_tokens, text_tokens)
    return batch * (forward + backward + 3 * lora_forward(config, adapter, image_tokens, text_tokens))


def input_backward(config: DenoiserConfig, image_tokens: int, text_tokens: int) -> int:
    """Operations of the backward pass of one sample for its inputs alone, from the last block on to the first.

    The products of the blocks once, attention's twice; what conditions on the noise level has no gradient.
    """
    block = _block(config, image_tokens + text_tokens)
    backward = config.layers * (sum(block.values()) - block["modulation"] + block["attention"])
    return backward + 2 * config.latent_channels * config.width * image_tokens


def lora_forward(config: DenoiserConfig, adapter: LoraConfig, image_tokens: int, text_tokens: int) -> int:
    """Operations of what an adapter adds to one forward pass of one sample: 2 a number of A and B and use of it."""
    total = 0
    for path, leaf in flatten_dict(lora.abstract(adapter, denoiser.abstract_params(config)), sep="/").items():
        layer = path.rpartition("/")[0]
        of_text = "/text/" in path or layer == "text_in"
        once = layer.endswith("/modulation") or layer in ("time_in", "time_out", "modulation_out")
        total += 2 * leaf.size * (1 if once else text_tokens if of_text else image_tokens)
    return total


def recomputation(config: DenoiserConfig, image_tokens: int, text_tokens: int, batch: int) -> int:
    """Operations that the backward pass of one optimiser step repeats under `config.remat`.

    `config.attention` must be a kernel by name: what a saved output spares depends on it.
    """
    block, kept = _block(config, image_tokens + text_tokens), denoiser.kept(config.remat)
    repeated = sum(operations for name, operations in block.items() if name not in kept)
    if config.attention == "blocked":
        # The CPU's blocks never keep their scores.
        repeated += block["attention"]
    elif config.attention == "xla" and "attention" in kept:
        # A fused kernel keeps the sums of its softmax too. XLA's needs the scores again, the first of two products.
        repeated += block["attention"] // 2
    return batch * config.layers * repeated


def gpt_oss_forward(config: GptOssConfig, tokens: int, past: int = 0) -> int:
    """Operations of all layers for `tokens` tokens of one prompt behind `past` cached ones, without the vocabulary.

    Only the experts that a token uses are counted, and only the keys that it sees.
    """
    c = config
    projections = 2 * c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    experts = 2 * c.width * c.experts + c.experts_per_token * 2 * 3 * c.width * c.hidden
    seen = [past + i + 1 for i in range(tokens)]
    windowed = sum(min(keys, c.window) for keys in seen)
    even, odd = (c.layers + 1) // 2, c.layers // 2
    return c.layers * tokens * (projections + experts) + 4 * c.heads * c.head_dim * (even * windowed + odd * sum(seen))


def eva_forward(config: EvaConfig) -> int:
    """Operations of classifying one image; norms, rotations and activations excluded."""
    c = config
    block = 4 * 2 * c.width**2 * c.tokens + 4 * c.tokens**2 * c.width + 3 * 2 * c.width * c.hidden * c.tokens
    return 2 * 3 * c.patch**2 * c.width * c.grid**2 + c.layers * block + 2 * c.width * c.classes


def autoencoder_decode(config: AutoencoderConfig, rows: int, columns: int) -> int:
    """Operations of decoding one grid of latent tokens to an image; norms and activations excluded."""
    c, widths = config, config.widths[::-1]
    cells = rows * columns * c.patch**2
    total = _conv(cells, c.cell_channels, c.cell_channels, 1) + _conv(cells, c.cell_channels, widths[0])
    total += _middle(cells, widths[0])
    inputs = widths[0]
    for level, width in enumerate(widths):
        total += _residuals(cells, inputs, width, c.layers + 1)
        if level < len(widths) - 1:
            cells *= 4
            total += _conv(cells, width, width)
        inputs = width
    return total + _conv(cells, inputs, 3)


def autoencoder_encode(config: AutoencoderConfig, rows: int, columns: int) -> int:
    """Operations of encoding an image to a grid of latent tokens; norms and activations excluded."""
    c, inputs = config, config.widths[0]
    cells = rows * columns * c.tile**2
    total = _conv(cells, 3, inputs)
    for level, width in enumerate(c.widths):
        total += _residuals(cells, inputs, width, c.layers)
        if level < len(c.widths) - 1:
            cells //= 4
            total += _conv(cells, width, width)
        inputs = width
    total += _middle(cells, inputs) + _conv(cells, inputs, 2 * c.cell_channels)
    return total + _conv(cells, 2 * c.cell_channels, 2 * c.cell_channels, 1)


def vit_forward(config: VitConfig) -> int:
    """Operations of one image; norms and activations excluded."""
    c = config
    mlp = 2 * 2 * c.width * c.hidden
    block = c.tokens * (4 * 2 * c.width**2 + mlp) + 4 * c.tokens**2 * c.width
    total = 2 * 3 * c.patch**2 * c.width * c.patches + c.layers * block + 2 * c.width * c.outputs
    if c.pool == "attention":
        # Keys and values of all tokens, one query, and what becomes of its answer.
        total += c.tokens * (2 * 2 * c.width**2 + 4 * c.width) + 2 * 2 * c.width**2 + mlp
    return total


def _conv(cells: int, inputs: int, outputs: int, side: int = 3) -> int:
    """A convolution that gives `cells` cells; what reaches over the border is counted as if it did not."""
    return 2 * side**2 * inputs * outputs * cells


def _residuals(cells: int, inputs: int, width: int, count: int) -> int:
    shortcut = _conv(cells, inputs, width, 1) if inputs != width else 0
    return _conv(cells, inputs, width) + (2 * count - 1) * _conv(cells, width, width) + shortcut


def _middle(cells: int, width: int) -> int:
    return 4 * _conv(cells, width, width) + 4 * 2 * width**2 * cells + 4 * cells**2 * width


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
