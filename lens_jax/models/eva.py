"""EVA-02, a vision transformer whose classifier scores how unsafe an image is (Fang et al. 2023, arXiv:2303.11331).

Patches and a class token with learned positions pass pre-norm blocks: attention whose queries and keys are turned by
their row and column (rotary positions, which the class token does not have), then a SwiGLU with a norm before its way
out. The mean of the patches, not the class token, is classified. Parameters are a plain nested dict, blocks stacked on
the leading axis and scanned.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from lens_jax.errors import LensError
from lens_jax.models.attention import Kernel, attend
from lens_jax.models.layers import rotary_table, rotate, scaled_layer_norm


@dataclasses.dataclass(frozen=True)
class EvaConfig:
    """Sizes of the network. The defaults are timm's eva02_base_patch14_448 with four classes: 86,351,620 parameters."""

    # Side of the square image, and of the squares that it is cut into.
    image: int = 448
    patch: int = 14
    # Width of the residual stream.
    width: int = 768
    layers: int = 12
    heads: int = 12
    # Hidden width of the SwiGLU.
    hidden: int = 2048
    classes: int = 4
    # Patches a side at which it was pre-trained: rows and columns of a finer grid are counted in steps of that one.
    rope_grid: int = 16
    # Base of the rotary frequencies.
    rope_theta: float = 10_000.0
    # Epsilon of every LayerNorm.
    norm_eps: float = 1e-6
    # What parameters are kept and products computed in; norms, softmax and the classifier are float32.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Attention kernel, as `models.attention` has it.
    attention: Kernel = "auto"

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise LensError(f"eva.dtype is {self.dtype!r}; accepted: float32, bfloat16")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not 0 < value < math.inf:
                raise LensError(f"eva.{field.name} is {value}; it must be positive")
        if self.image % self.patch:
            raise LensError(f"eva.image {self.image} must be a multiple of eva.patch {self.patch}")
        if self.width % (4 * self.heads):
            raise LensError(f"eva.width {self.width} must be a multiple of 4 eva.heads, {4 * self.heads}")

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.grid**2 + 1

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def abstract_params(config: EvaConfig) -> dict:
    """Shapes and dtypes of the parameters."""
    c = config
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(c.dtype))
    norm = lambda *shape: {"scale": leaf(*shape), "bias": leaf(*shape)}
    return {
        "patch": {"kernel": leaf(c.patch * c.patch * 3, c.width), "bias": leaf(c.width)},
        "class_token": leaf(c.width),
        # Of the class token first, then of the patches row by row.
        "positions": leaf(c.tokens, c.width),
        "blocks": {
            "attention_norm": norm(c.layers, c.width),
            "qkv": {"kernel": leaf(c.layers, c.width, 3, c.heads, c.head_dim)},
            # Keys have none.
            "q": {"bias": leaf(c.layers, c.heads, c.head_dim)},
            "v": {"bias": leaf(c.layers, c.heads, c.head_dim)},
            "out": {"kernel": leaf(c.layers, c.heads, c.head_dim, c.width), "bias": leaf(c.layers, c.width)},
            "mlp_norm": norm(c.layers, c.width),
            "gate_up": {"kernel": leaf(c.layers, c.width, 2, c.hidden), "bias": leaf(c.layers, 2, c.hidden)},
            "hidden_norm": norm(c.layers, c.hidden),
            "down": {"kernel": leaf(c.layers, c.hidden, c.width), "bias": leaf(c.layers, c.width)},
        },
        "norm": norm(c.width),
        "head": {"kernel": leaf(c.width, c.classes), "bias": leaf(c.classes)},
    }


def parameter_count(config: EvaConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def init(config: EvaConfig, key: jax.Array) -> dict:
    """Random parameters of a sensible magnitude, for tests and benchmarks. Nothing here trains this model."""

    # Outputs of each product, to divide the numbers of its kernel by: its inputs, whose sum is to be of variance one.
    outputs = {"qkv": 3 * config.width, "gate_up": 2 * config.hidden, "head": config.classes}

    def draw(path, leaf, key):
        name, layer = path[-1].key, path[-2].key if len(path) > 1 else ""
        copies = config.layers if path[0].key == "blocks" else 1
        scale = (leaf.size // copies // outputs.get(layer, config.width)) ** -0.5 if name == "kernel" else 0.1
        noise = scale * jax.random.normal(key, leaf.shape)
        return (1 + noise if name == "scale" else noise).astype(leaf.dtype)

    paths, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    keys = jax.random.split(key, len(paths))
    return tree.unflatten([draw(path, leaf, k) for (path, leaf), k in zip(paths, keys)])


def grid_positions(config: EvaConfig) -> np.ndarray:
    """Rows and columns float32 [tokens, 2], in steps of the pre-training grid; the class token's, 0, turn nothing."""
    steps = np.arange(config.grid, dtype=np.float32) / config.grid * config.rope_grid
    patches = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    return np.concatenate([np.zeros((1, 2), np.float32), patches])


def apply(config: EvaConfig, params: dict, pixels: jax.Array) -> jax.Array:
    """Logits float32 [B, classes] of normalised pixels [B, image, image, 3].

    params: the tree of `abstract_params`. On a mesh the rows may be sharded, and parameters are whole on every device.
    """
    c, dtype = config, jnp.dtype(config.dtype)
    if pixels.shape[1:] != (c.image, c.image, 3):
        raise LensError(f"eva: pixels are {list(pixels.shape)}; accepted: [B, {c.image}, {c.image}, 3]")
    with jax.named_scope("in"):
        # One axis after the other: of an array with sharded rows JAX splits no two at once.
        squares = rearrange(pixels.astype(dtype), "b (h p) y c -> b h p y c", p=c.patch)
        squares = rearrange(squares, "b h p (w q) c -> b h p w q c", q=c.patch)
        kernel = params["patch"]["kernel"].reshape(c.patch, c.patch, 3, c.width)
        patches = rearrange(jnp.einsum("bhpwqc,pqcd->bhwd", squares, kernel), "b h w d -> b (h w) d")
        patches = patches + params["patch"]["bias"]
        # The class token is no product of the batch: its row is zero until its position and it are added.
        added = params["positions"].at[0].add(params["class_token"])
        x = jnp.pad(patches, ((0, 0), (1, 0), (0, 0))) + added
        table = rotary_table(jnp.asarray(grid_positions(c)), (c.head_dim // 2,) * 2, c.rope_theta)
    with jax.named_scope("blocks"):
        x, _ = jax.lax.scan(lambda x, block: (_block(c, block, x, table), None), x, params["blocks"])
    with jax.named_scope("out"):
        mean = jnp.mean(x[:, 1:].astype(jnp.float32), axis=1)
        return _dense(scaled_layer_norm(mean, params["norm"], c.norm_eps), params["head"])


def _block(config: EvaConfig, params: dict, x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [B, tokens, width] through one block."""
    norm = functools.partial(scaled_layer_norm, eps=config.norm_eps)
    with jax.named_scope("attention"):
        qkv = jnp.einsum("btw,wnhd->btnhd", norm(x, params["attention_norm"]), params["qkv"]["kernel"])
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, v = q + params["q"]["bias"], v + params["v"]["bias"]
        every = rotate(q, table), rotate(k, table), v
        mixed, _ = attend(every, tuple(part[:, :0] for part in every), None, kernel=config.attention)
        x = x + jnp.einsum("bthd,hdw->btw", mixed, params["out"]["kernel"]) + params["out"]["bias"]
    with jax.named_scope("mlp"):
        gate_up = jnp.einsum("btw,wnf->btnf", norm(x, params["mlp_norm"]), params["gate_up"]["kernel"])
        gate_up = gate_up + params["gate_up"]["bias"]
        hidden = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return x + _dense(norm(hidden, params["hidden_norm"]), params["down"])


def _dense(x: jax.Array, params: dict) -> jax.Array:
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)
