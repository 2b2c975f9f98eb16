"""Batches of images and captions to what the step reads: latents, text features, positions.

Wherever they come from, a step sees the same contract: `latents` [B, N, C], `text` a tuple of [B, T, width],
`text_lengths` int32 [B], `positions` int32 [N + T, 3] and, where latents are padded, `n_image`.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax import parallel
from lens_jax.data.buckets import Bucket, areas
from lens_jax.data.manifest import load_manifest
from lens_jax.data.pipeline import batches
from lens_jax.encoders.images import CodecWeights, encode_rows
from lens_jax.encoders.text import TextEncoder, TextFeatures
from lens_jax.errors import LensError
from lens_jax.models.latent_grid import latent_grid
from lens_jax.models.layers import joint_positions
from lens_jax.pretraining.config import TrainConfig

# Batches that a codec without weights of its own is fitted on.
_FIT_BATCHES = 32


class Tokens(NamedTuple):
    """How many tokens the rows of a bucket's batches have."""

    # Rows and columns of latent tokens.
    grid: tuple[int, int]
    # Latent tokens with their padding.
    padded: int
    # Room for the tokens of a caption.
    text: int

    @property
    def image(self) -> int:
        return math.prod(self.grid)


def token_counts(config: TrainConfig, buckets: Sequence[Bucket], sequence: int = 1) -> dict[Bucket, Tokens]:
    """Tokens of every bucket on a mesh whose axis `sequence` has so many devices.

    With `data.pad_areas` all buckets of an area have as many image tokens as the one with the most, and with
    `data.joint_multiple` room for text is added until image and text together are a multiple of it.
    """
    grids = {bucket: latent_grid(config.codec, bucket.height, bucket.width) for bucket in buckets}
    # In pixels: what an area is does not depend on how many of them make a token.
    area = dict(zip(buckets, areas(buckets, tile=1)))
    most = {a: max(math.prod(grids[b]) for b in buckets if area[b] == a) for a in area.values()}
    counts = {}
    for bucket, grid in grids.items():
        padded = math.prod(grid)
        if config.data.pad_areas:
            padded = _round_up(most[area[bucket]], sequence)
        elif padded % sequence:
            raise LensError(
                f"mesh.sequence {sequence} does not divide the {padded} image tokens of {bucket}; set data.pad_areas"
            )
        text = _round_up(config.text.max_tokens, sequence)
        while (padded + text) % config.data.joint_multiple:
            text += sequence
            if text > config.text.max_tokens + sequence * config.data.joint_multiple:
                raise LensError(
                    f"data.joint_multiple {config.data.joint_multiple} cannot be reached with mesh.sequence {sequence} "
                    f"and {padded} image tokens; use a power of two"
                )
        counts[bucket] = Tokens(grid, padded, text)
    return counts


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def abstract_batch(config: TrainConfig, images: int, tokens: Tokens, mesh=None) -> dict:
    """Shapes, dtypes and, on a mesh, layouts of what `Features.encode` gives for a batch of so many images."""
    array = functools.partial(parallel.abstract_array, mesh=mesh)
    layer = array("text", (images, tokens.text, config.text.width), config.text.dtype)
    batch = {
        "latents": array("latents", (images, tokens.padded, config.codec.latent_channels), jnp.float32),
        "text": (layer,) * config.text.num_layers,
        "text_lengths": array("text_lengths", (images,), jnp.int32),
        "positions": array("positions", (tokens.padded + tokens.text, 3), jnp.int32),
    }
    return {**batch, "n_image": array("n_image", (), jnp.int32)} if config.data.pad_areas else batch


class Features:
    """The codec and the text encoder in front of a run, and what is done to a batch before the step."""

    def __init__(self, config: TrainConfig, buckets: Sequence[Bucket], mesh=None, cached: bool = False):
        """With `cached` batches come with latents and features, and the networks are loaded for samples only."""
        self._config, self._mesh, self._cached = config, mesh, cached
        self.counts = token_counts(config, buckets, 1 if mesh is None else mesh.shape["sequence"])
        if not cached:
            # Better now than when the first batch comes.
            self.codec, self.text_encoder  # noqa: B018

    @functools.cached_property
    def codec(self) -> CodecWeights:
        """The codec's released weights, where it has some."""
        return self._config.codec.load(self._mesh)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        return self._config.text.load(self._mesh)

    def read(self, batch: dict) -> dict:
        """The host's part, done in the reading threads: captions become what the devices make features of."""
        batch, tokens = dict(batch), self.counts[Bucket(*batch["bucket"])]
        if self._cached:
            batch["latents"] = _pad(batch["latents"], tokens.padded)
            batch["text"] = tuple(_pad(layer, tokens.text) for layer in batch["text"])
        else:
            batch["text_inputs"], batch["text_lengths"] = self.text_encoder.tokens(batch.pop("captions"))
        return batch

    def encode(self, fitted: dict, batch: dict) -> dict:
        """The devices' part: this process's rows to the whole batch, spread over the mesh; `fitted` as below."""
        batch = dict(batch)
        step, tokens = np.int32(batch.pop("step")), self.counts[Bucket(*batch.pop("bucket"))]
        batch["positions"] = _positions(tokens)
        if self._config.data.pad_areas:
            batch["n_image"] = np.int32(tokens.image)
        batch = parallel.place_batch(batch, self._mesh)
        if "pixels" in batch:
            inputs = self.codec_params(fitted), batch.pop("pixels"), step
            static = self._config.codec, tokens.padded, self._config.seed
            batch["latents"] = parallel.on(self._mesh, image_program)(*static, *inputs)
        if "text_inputs" in batch:
            batch["text"] = self._encode_text(tokens.text, batch.pop("text_inputs"), batch["text_lengths"])
        return batch

    def _encode_text(self, room: int, values: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
        program = parallel.on(self._mesh, text_program)
        return program(self._config.text, room, self.text_encoder.params, values, lengths)

    def codec_params(self, fitted: dict) -> dict:
        """The parameters of the codec, whichever it is: its released ones, or those `fitted` on the data set."""
        return fitted or self.codec.params

    def prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of a few prompts on the host, for samples. All processes must call it."""
        found = self.text_encoder.encode(prompts)
        if self._cached:
            # It has done all it is needed for, and GPT-OSS takes 12.6 GB.
            del self.text_encoder
        return found

    def latents(self, fitted: dict, pixels: np.ndarray) -> np.ndarray:
        """Latents [B, N, C] on the host of images uint8 [B, H, W, 3] of one bucket, without padding."""
        bucket = pixels.shape[1:3]
        batch = self.encode(fitted, {"pixels": pixels, "bucket": bucket, "step": 0})
        return np.asarray(batch["latents"])[:, : self.counts[Bucket(*bucket)].image]

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """Text tokens of each caption."""
        return self.text_encoder.tokens(captions).lengths

    def text(self, captions: Sequence[str], room: int) -> tuple[np.ndarray, np.ndarray]:
        """(features [layers, B, room, width], lengths [B]) on the host of captions of at most `room` tokens."""
        values, lengths = self.text_encoder.tokens(captions)
        batch = parallel.place_batch({"text_inputs": values[:, :room], "text_lengths": lengths}, self._mesh)
        layers = self._encode_text(room, batch["text_inputs"], batch["text_lengths"])
        return np.stack([np.asarray(layer) for layer in layers]), lengths

    def weights(self) -> dict[str, str]:
        """A digest of the weights of each frozen network."""
        networks = {"autoencoder": self.codec, "text_encoder": self.text_encoder}
        return {name: network.digest for name, network in networks.items() if network.digest}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def image_program(codec, padded: int, seed: int, params: dict, pixels: jax.Array, step: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> latents [B, padded, C] laid out as a batch's are."""
    # Only where the codec samples; a batch taken again after a resume draws the same.
    key = jax.random.fold_in(jax.random.key(seed), step)
    return _spread("latents", _pad(encode_rows(codec, params, pixels, key), padded))


@functools.partial(jax.jit, static_argnums=(0, 1))
def text_program(text, room: int, params, values: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    """What `TextEncoder.tokens` gave -> feature layers [B, room, width] laid out as a batch's are."""
    return tuple(_spread("text", _pad(layer, room)) for layer in text.features(params, values, lengths))


def _spread(name: str, x: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.reshard(x, parallel.batch_spec(name, x.ndim, mesh))


def _pad(x, length: int):
    """[B, n, C] with zeros behind its n rows up to `length`; of numpy or of JAX."""
    missing = length - x.shape[1]
    if not missing:
        return x
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, ((0, 0), (0, missing), (0, 0)))


def fit_codec(config: TrainConfig) -> dict:
    """What a codec without weights of its own fits to the images of the first batches; {} for one that has some."""
    if not config.codec.abstract_fitted():
        return {}
    made = load_manifest(config.data.path).features
    if made:
        return {name: np.array(value, np.float32) for name, value in made["fitted"].items()}
    reader = batches(config.data, num_steps=_FIT_BATCHES)
    try:
        return config.codec.fit(batch["pixels"] for batch in reader)
    finally:
        reader.close()


@functools.cache
def _positions(tokens: Tokens) -> np.ndarray:
    """Positions of the grid, of its padding, and of the text."""
    positions = joint_positions(*tokens.grid, tokens.text)
    padding = np.zeros((tokens.padded - tokens.image, 3), np.int32)
    return np.concatenate([positions[: tokens.image], padding, positions[tokens.image :]])
