"""The Lens denoiser in plain eager PyTorch: same names, same arithmetic as the release (release: `transformer/`).

Written from the description of the release, as one would write it for use: fused projections, PyTorch's fused attention
and norms, rotary tables kept between calls. `lens_jax.models.denoiser` is checked against it and timed against it.
Modules are named so that `state_dict` has the names and shapes of the release (2.1); sections below are of that text.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_jax.errors import LensError
from lens_jax.models.denoiser import DenoiserConfig


class RMSNorm(nn.RMSNorm):
    """PyTorch's, whose fused kernel wants a weight of the input's dtype: under autocast it is not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t, cosines first, through two layers (3.1)."""

    def __init__(self, width: int, channels: int = 256):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """t [B] in [0, 1] -> [B, width] in the dtype of the weights."""
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        # In the order of diffusers' `Timesteps`: 1000 (t f), which rounds otherwise than (1000 t) f.
        angles = 1000.0 * (t.float()[:, None] * torch.exp(-math.log(10_000.0) * steps / half))
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class FeedForward(nn.Module):
    """SwiGLU without biases (3.3)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class JointAttention(nn.Module):
    """Image and text attend to both, in the joint order image, text (3.3)."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            RMSNorm(config.head_dim, eps=1e-6) for _ in range(4)
        )
        self.img_qkv = nn.Linear(width, 3 * width)
        self.txt_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Identity()])
        self.to_add_out = nn.Linear(width, width)

    def forward(self, image: Tensor, text: Tensor, rotary: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """image [B, N, W], text [B, T, W], rotary complex64 [N + T, head_dim / 2], mask bool [B, 1, 1, N + T]."""
        # [B, S, 3, heads, head_dim] -> three of [B, S, heads, head_dim]
        image_q, image_k, image_v = self.img_qkv(image).unflatten(-1, (3, self.heads, -1)).unbind(2)
        text_q, text_k, text_v = self.txt_qkv(text).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = torch.cat([self.norm_q(image_q), self.norm_added_q(text_q)], dim=1)
        k = torch.cat([self.norm_k(image_k), self.norm_added_k(text_k)], dim=1)
        v = torch.cat([image_v, text_v], dim=1)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, rotary), rotate(k, rotary), v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        image, text = mixed.split([image.shape[1], text.shape[1]], dim=1)
        return self.to_out[0](image), self.to_add_out(text)


class Block(nn.Module):
    """A joint block: attention over both streams, then each its own feed-forward (3.3)."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        width = config.width
        self.attn = JointAttention(config)
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)))
            self.add_module(f"{stream}_norm1", RMSNorm(width, eps=1e-6))
            self.add_module(f"{stream}_norm2", RMSNorm(width, eps=1e-6))
            self.add_module(f"{stream}_mlp", FeedForward(width, config.hidden))

    def forward(self, image: Tensor, text: Tensor, time: Tensor, rotary: Tensor, mask: Tensor | None):
        """image [B, N, W], text [B, T, W], time [B, W] -> image, text."""
        image_mod = self.img_mod(time)[:, None].chunk(6, dim=-1)
        text_mod = self.txt_mod(time)[:, None].chunk(6, dim=-1)
        image_out, text_out = self.attn(
            modulate(self.img_norm1(image), *image_mod[:2]), modulate(self.txt_norm1(text), *text_mod[:2]), rotary, mask
        )
        image = image + image_mod[2] * image_out
        text = text + text_mod[2] * text_out
        image = image + image_mod[5] * self.img_mlp(modulate(self.img_norm2(image), *image_mod[3:5]))
        text = text + text_mod[5] * self.txt_mlp(modulate(self.txt_norm2(text), *text_mod[3:5]))
        return image, text


class TorchDenoiser(nn.Module):
    """The denoiser; of the config, the sizes count, and `dtype`, `remat` and the like do not: use `.to(...)`."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(width)})
        self.txt_norm = nn.ModuleList(RMSNorm(config.text_width, eps=1e-5) for _ in range(config.text_layers))
        self.txt_in = nn.Linear(config.text_layers * config.text_width, width)
        self.img_in = nn.Linear(config.latent_channels, width)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(width, 2 * width)})
        self.proj_out = nn.Linear(width, config.latent_channels)

    def forward(
        self,
        latents: Tensor,
        text: Sequence[Tensor],
        t: Tensor,
        grid: tuple[int, int],
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity (noise - clean), in the dtype of `latents` [B, N, latent_channels].

        Args:
          text: `text_layers` of [B, T, text_width].
          t: noise level [B] in [0, 1].
          grid: rows and columns of latent tokens, N of them.
          text_mask: bool [B, T], true for real tokens; None when all are, which leaves PyTorch more kernels to choose.
        """
        self._check(latents, text, grid)
        dtype = self.img_in.weight.dtype
        image = self.img_in(latents.to(dtype))
        text = self.txt_in(torch.cat([norm(layer.to(dtype)) for norm, layer in zip(self.txt_norm, text)], dim=-1))
        time = self.time_text_embed["timestep_embedder"](t)
        rotary = rotary_table(grid, text.shape[1], self.config.rope_axes, self.config.rope_theta, latents.device)
        mask = None
        if text_mask is not None:
            mask = F.pad(text_mask, (image.shape[1], 0), value=True)[:, None, None]
        for block in self.transformer_blocks:
            image, text = block(image, text, time, rotary, mask)
        # Scale before shift here, the opposite of the blocks (3.4).
        scale, shift = self.norm_out["linear"](F.silu(time))[:, None].chunk(2, dim=-1)
        image = modulate(F.layer_norm(image, image.shape[-1:], eps=1e-6), shift, scale)
        return self.proj_out(image).to(latents.dtype)

    def _check(self, latents: Tensor, text: Sequence[Tensor], grid: tuple[int, int]) -> None:
        c = self.config
        if latents.ndim != 3 or latents.shape[1:] != (math.prod(grid), c.latent_channels):
            raise LensError(
                f"latents are {list(latents.shape)}; accepted: [B, {math.prod(grid)}, {c.latent_channels}] for a grid "
                f"of {grid[0]} x {grid[1]}"
            )
        shapes = [list(layer.shape) for layer in text]
        if len(shapes) != c.text_layers or any(s != [len(latents), s[1], c.text_width] for s in shapes):
            raise LensError(f"text is {shapes}; accepted: {c.text_layers} of [{len(latents)}, T, {c.text_width}]")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [B, S, heads, head_dim] as complex numbers, in float32 (3.2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary[:, None]).flatten(-2).type_as(x)


# Outside of inference mode even when first called in it: the table is kept, and a backward pass may want it later.
@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def rotary_table(
    grid: tuple[int, int], text_tokens: int, axes: tuple[int, ...], theta: float, device: torch.device
) -> Tensor:
    """Unit complex numbers, complex64 [N + T, sum(axes) / 2], of the centred grid and the text behind it (3.2)."""
    rows, columns = grid
    centred = [torch.arange(size) - (size - size // 2) for size in grid]
    start = max(rows // 2, columns // 2)
    text = (start + torch.arange(text_tokens))[:, None].expand(-1, 3)
    image = torch.stack(torch.meshgrid(torch.zeros(1).long(), *centred, indexing="ij"), -1).reshape(-1, 3)
    positions = torch.cat([image, text]).float()
    angles = [
        positions[:, i, None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        for i, dim in enumerate(axes)
    ]
    angles = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angles), angles).to(device)


def load_release(model: TorchDenoiser, tensors: Mapping[str, np.ndarray]) -> TorchDenoiser:
    """Copy the tensors of a release into the model, one at a time, cast to the model's dtype; returns the model.

    Raises LensError for names or shapes that are not the model's.
    """
    own = model.state_dict()
    missing, extra = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    if missing or extra:
        raise LensError(f"denoiser: missing {missing[:4]} ({len(missing)}), not expected {extra[:4]} ({len(extra)})")
    for name, target in own.items():
        array = tensors[name]
        if array.shape != tuple(target.shape):
            raise LensError(f"denoiser: {name} is {list(array.shape)}; accepted: {list(target.shape)}")
        # Through float32, which holds every value of the half types that numpy knows and torch does not.
        target.copy_(torch.from_numpy(array.astype(np.float32)))
    return model
