"""Vision transformers that embed and score images: CLIP (Radford et al. 2021, arXiv:2103.00020) and SigLIP (Zhai et al.
2023, arXiv:2303.15343) with a pooling of its own or as a classifier.

Patches with learned positions pass pre-norm blocks of attention and a two-layer MLP, and a last norm. What is made of
the tokens then differs by `pool`. Parameters are a plain nested dict, blocks stacked on the leading axis and scanned.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from lens_jax.errors import LensError
from lens_jax.models.attention import Kernel, attend
from lens_jax.models.layers import scaled_layer_norm

DTYPES = ("float32", "bfloat16")
Activation = Literal["quick_gelu", "gelu_tanh"]
# `class` (CLIP): a class token is the first, tokens pass a norm before the first block, and the token is projected,
# without a bias. `attention` (SigLIP): a learned query attends to the tokens, then an MLP with a residual. `mean`
# (SigLIP as transformers classifies with it): the mean of the tokens is classified.
Pool = Literal["class", "attention", "mean"]


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Sizes of the network. The defaults are CLIP ViT-L/14's image tower."""

    # Side of the square image, and of the squares that it is cut into; pixels beyond the last whole square are not
    # seen, as those of 384 in squares of 14 are.
    image: int = 224
    patch: int = 14
    # Width of the residual stream.
    width: int = 1024
    layers: int = 24
    heads: int = 16
    # Hidden width of the MLP.
    hidden: int = 4096
    # Between its two layers: x sigmoid(1.702 x), or GELU by its tanh.
    activation: Activation = "quick_gelu"
    # What becomes of the tokens.
    pool: Pool = "class"
    # Numbers of the projection, or classes; 0 with `attention`, which gives `width` numbers.
    outputs: int = 768
    # Epsilon of every LayerNorm.
    norm_eps: float = 1e-5
    # What parameters are kept and products computed in; norms, softmax and the outputs are float32.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Attention kernel, as `models.attention` has it.
    attention: Kernel = "auto"

    def __post_init__(self):
        accepted = {"activation": ("quick_gelu", "gelu_tanh"), "pool": ("class", "attention", "mean"), "dtype": DTYPES}
        for name, words in accepted.items():
            if getattr(self, name) not in words:
                raise LensError(f"vit.{name} is {getattr(self, name)!r}; accepted: {', '.join(words)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and field.name != "outputs" and not 0 < value < math.inf:
                raise LensError(f"vit.{field.name} is {value}; it must be positive")
        if self.patch > self.image:
            raise LensError(f"vit.patch {self.patch} is larger than vit.image {self.image}")
        if self.width % self.heads:
            raise LensError(f"vit.width {self.width} must be a multiple of vit.heads {self.heads}")
        if (self.outputs > 0) != (self.pool != "attention"):
            raise LensError(f"vit.outputs is {self.outputs}; accepted: 0 with vit.pool attention, else at least 1")

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Patches, and the class token where there is one."""
        return self.patches + (self.pool == "class")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def result(self) -> int:
        """Numbers that `apply` gives for an image."""
        return self.outputs or self.width


CLIP_L14 = VitConfig()
SIGLIP_SO400M_384 = VitConfig(
    image=384, width=1152, layers=27, hidden=4304, activation="gelu_tanh", pool="attention", outputs=0, norm_eps=1e-6
)
SIGLIP2_BASE_224 = VitConfig(
    patch=16,
    width=768,
    layers=12,
    heads=12,
    hidden=3072,
    activation="gelu_tanh",
    pool="mean",
    outputs=2,
    norm_eps=1e-6,
)


def abstract_params(config: VitConfig) -> dict:
    """Shapes and dtypes of the parameters."""
    c = config
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(c.dtype))
    norm = lambda *stack: {"scale": leaf(*stack, c.width), "bias": leaf(*stack, c.width)}
    dense = lambda stack, inputs, outputs: {
        "kernel": leaf(*stack, *inputs, *outputs),
        "bias": leaf(*stack, *outputs),
    }

    def mlp(*stack):
        return {
            "mlp_norm": norm(*stack),
            "up": dense(stack, (c.width,), (c.hidden,)),
            "down": dense(stack, (c.hidden,), (c.width,)),
        }

    params = {
        "patch": dense((), (c.patch**2 * 3,), (c.width,)),
        # Of the class token first, then of the patches row by row.
        "positions": leaf(c.tokens, c.width),
        "blocks": {
            "attention_norm": norm(c.layers),
            "qkv": dense((c.layers,), (c.width,), (3, c.heads, c.head_dim)),
            "out": dense((c.layers,), (c.heads, c.head_dim), (c.width,)),
            **mlp(c.layers),
        },
        "norm": norm(),
    }
    if c.pool == "class":
        del params["patch"]["bias"]
        return params | {
            "class_token": leaf(c.width),
            "norm_in": norm(),
            "head": {"kernel": leaf(c.width, c.outputs)},
        }
    if c.pool == "mean":
        return params | {"head": dense((), (c.width,), (c.outputs,))}
    pool = {
        "query": leaf(c.width),
        "qkv": dense((), (c.width,), (3, c.heads, c.head_dim)),
        "out": dense((), (c.heads, c.head_dim), (c.width,)),
        **mlp(),
    }
    return params | {"pool": pool}


def parameter_count(config: VitConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def init(config: VitConfig, key: jax.Array) -> dict:
    """Random parameters of a sensible magnitude, for tests and benchmarks. Nothing here trains this model."""

    def draw(path, leaf, key):
        name, layer = path[-1].key, path[-2].key if len(path) > 1 else ""
        spread = 0.1
        if name == "kernel":  # variance is kept: one by the square root of an output's inputs
            inputs = {"patch": 3 * config.patch**2, "down": config.hidden}.get(layer, config.width)
            spread = inputs**-0.5
        noise = spread * jax.random.normal(key, leaf.shape)
        return (1 + noise if name == "scale" else noise).astype(leaf.dtype)

    paths, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    keys = jax.random.split(key, len(paths))
    return tree.unflatten([draw(path, leaf, k) for (path, leaf), k in zip(paths, keys)])


def apply(config: VitConfig, params: dict, pixels: jax.Array) -> jax.Array:
    """float32 [B, result] of normalised pixels [B, image, image, 3]: a projection, pooled features, or logits.

    params: the tree of `abstract_params`. On a mesh the rows may be sharded, and parameters are whole on every device.
    """
    c = config
    if pixels.shape[1:] != (c.image, c.image, 3):
        raise LensError(f"vit: pixels are {list(pixels.shape)}; accepted: [B, {c.image}, {c.image}, 3]")
    with jax.named_scope("in"):
        x = _embed(c, params, pixels.astype(c.dtype))
    with jax.named_scope("blocks"):
        x, _ = jax.lax.scan(lambda x, block: (_block(c, block, x), None), x, params["blocks"])
    with jax.named_scope("out"):
        if c.pool == "class":
            x = x[:, 0]
        x = scaled_layer_norm(x.astype(jnp.float32), params["norm"], c.norm_eps)
        if c.pool == "attention":
            return _attention_pool(c, params["pool"], x.astype(c.dtype)).astype(jnp.float32)
        if c.pool == "mean":
            x = jnp.mean(x, axis=1)
        return _dense("bw,wo->bo", x, params["head"])


def _embed(config: VitConfig, params: dict, pixels: jax.Array) -> jax.Array:
    """Pixels [B, image, image, 3] to tokens [B, tokens, width]."""
    c = config
    side, rows = c.image // c.patch, len(pixels)
    seen = pixels[:, : side * c.patch, : side * c.patch]
    # Axis by axis, which on a mesh leaves no doubt about where the rows of the result are.
    strips = seen.reshape(rows, side, c.patch, side * c.patch, 3)
    squares = strips.reshape(rows, side, c.patch, side, c.patch, 3)
    kernel = params["patch"]["kernel"].reshape(c.patch, c.patch, 3, c.width)
    x = _dense("bhpwqc,pqcd->bhwd", squares, {**params["patch"], "kernel": kernel})
    x = x.reshape(rows, c.patches, c.width)
    if c.pool != "class":
        return x + params["positions"].astype(x.dtype)
    # The class token does not depend on the image: its row is zero until it is added with its position.
    added = params["positions"].at[0].add(params["class_token"])
    x = jnp.pad(x, ((0, 0), (1, 0), (0, 0))) + added.astype(x.dtype)
    return scaled_layer_norm(x, params["norm_in"], c.norm_eps)


def _block(config: VitConfig, params: dict, x: jax.Array) -> jax.Array:
    """x [B, tokens, width] through one block."""
    with jax.named_scope("attention"):
        qkv = _dense("btw,wnhd->btnhd", scaled_layer_norm(x, params["attention_norm"], config.norm_eps), params["qkv"])
        every = tuple(qkv[:, :, i] for i in range(3))
        mixed, _ = attend(every, tuple(part[:, :0] for part in every), None, kernel=config.attention)
        x = x + _dense("bthd,hdw->btw", mixed, params["out"])
    with jax.named_scope("mlp"):
        return x + _mlp(config, params, x)


def _mlp(config: VitConfig, params: dict, x: jax.Array) -> jax.Array:
    """x [B, ..., width] through the norm and the two layers behind it."""
    hidden = _dense("...w,wf->...f", scaled_layer_norm(x, params["mlp_norm"], config.norm_eps), params["up"])
    quick = config.activation == "quick_gelu"
    hidden = hidden * jax.nn.sigmoid(1.702 * hidden) if quick else jax.nn.gelu(hidden, approximate=True)
    return _dense("...f,fw->...w", hidden, params["down"])


def _attention_pool(config: VitConfig, params: dict, x: jax.Array) -> jax.Array:
    """Tokens [B, tokens, width] to [B, width]: what the learned query finds, then the MLP with its residual."""
    part = lambda i: {name: leaf[..., i, :, :] for name, leaf in params["qkv"].items()}
    q = _dense("w,whd->hd", params["query"].astype(x.dtype), part(0))
    k, v = (_dense("btw,whd->bthd", x, part(i)) for i in (1, 2))
    scores = jnp.einsum("hd,bthd->bht", q, k, preferred_element_type=jnp.float32) * config.head_dim**-0.5
    mixed = jnp.einsum("bht,bthd->bhd", jax.nn.softmax(scores).astype(x.dtype), v)
    mixed = _dense("bhd,hdw->bw", mixed, params["out"])
    return mixed + _mlp(config, params, mixed)


def _dense(spec: str, x: jax.Array, params: dict) -> jax.Array:
    """A product in the dtype of `x`, with the bias where there is one."""
    y = jnp.einsum(spec, x, params["kernel"].astype(x.dtype))
    return y + params["bias"].astype(x.dtype) if "bias" in params else y
