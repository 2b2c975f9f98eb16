"""Batches of images and captions to what the step reads: latents, text features, positions.

Wherever they come from, a step sees the same contract: `latents` [B, N, C], `text` a tuple of [B, T, width],
`text_lengths` int32 [B], `positions` int32 [N + T, 3] and, where latents are padded, `n_image`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax import parallel
from lens_jax.data.datasets import DataSets
from lens_jax.data.mixture import Shape
from lens_jax.data.pipeline import batches
from lens_jax.encoders.images import CodecWeights, encode_rows
from lens_jax.encoders.text import TextEncoder, TextFeatures
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.tokens import CutCaptions, Tokens, fit_text, positions, token_counts

# Batches that a codec without weights of its own is fitted on.
_FIT_BATCHES = 32


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

    def __init__(self, config: TrainConfig, shapes: Sequence[Shape], mesh=None, cached: bool = False):
        """With `cached` batches come with latents and features, and the networks are loaded for samples only."""
        self._config, self._mesh, self._cached = config, mesh, cached
        self.counts = token_counts(config, shapes, 1 if mesh is None else mesh.shape["sequence"])
        self.cut_captions = CutCaptions()
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
        """The host's part, done in the reading threads: captions become what the devices make features of.

        They are cut to the room for text that the batch's shape has.
        """
        batch, tokens = dict(batch), self.counts[Shape.of(batch)]
        if self._cached:
            batch["latents"] = _pad(batch["latents"], tokens.padded)
        else:
            batch["text_inputs"], batch["text_lengths"] = self.text_encoder.tokens(batch.pop("captions"))
        text = {name: batch[name] for name in ("text", "text_inputs") if name in batch}
        text, batch["text_lengths"] = self._cut(text, batch["text_lengths"], tokens.text)
        batch |= text
        if "text" in batch:
            batch["text"] = tuple(_pad(layer, tokens.text) for layer in batch["text"])
        return batch

    def _cut(self, values, lengths: np.ndarray, room: int):
        """(a tree of [B, T, ...], lengths [B]) of whole captions to what there is room for, and at most is read."""
        text = self._config.text
        most = min(room, text.max_tokens)
        self.cut_captions.add(int((lengths > most).sum()), len(lengths))
        values = jax.tree.map(lambda x: fit_text(x, lengths, most, text.suffix_tokens), values)
        return values, np.minimum(lengths, np.int32(most))

    def encode(self, fitted: dict, batch: dict) -> dict:
        """The devices' part: this process's rows to the whole batch, spread over the mesh; `fitted` as below."""
        batch = dict(batch)
        step, tokens = np.int32(batch.pop("step")), self.counts[Shape.of(batch)]
        del batch["bucket"], batch["text_class"]
        batch["positions"] = positions(tokens)
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
        batch = {"pixels": pixels, "bucket": pixels.shape[1:3], "text_class": 0, "step": 0}
        tokens = self.counts[Shape.of(batch)]
        return np.asarray(self.encode(fitted, batch)["latents"])[:, : tokens.image]

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """Text tokens that are read of each caption."""
        return np.minimum(self.text_encoder.tokens(captions).lengths, self._config.text.max_tokens)

    def text(self, captions: Sequence[str], room: int) -> tuple[np.ndarray, np.ndarray]:
        """(features [layers, B, room, width], lengths [B]) on the host of the first `room` tokens of captions."""
        values, lengths = self._cut(*self.text_encoder.tokens(captions), room)
        batch = parallel.place_batch({"text_inputs": values, "text_lengths": lengths}, self._mesh)
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


def fit_codec(config: TrainConfig, data: DataSets) -> dict:
    """What a codec without weights of its own fits to the images of the first batches; {} for one that has some."""
    if not config.codec.abstract_fitted():
        return {}
    if data.features:
        return {name: np.array(value, np.float32) for name, value in data.features["fitted"].items()}
    reader = batches(data, count=_FIT_BATCHES)
    try:
        return config.codec.fit(batch["pixels"] for batch in reader)
    finally:
        reader.close()
