"""Batches of images and captions to what the step reads: latents, text features, positions.

Wherever they come from, a step sees the same contract: `latents` [B, N, C], `text` a tuple of [B, T, width],
`text_lengths` int32 [B], `positions` int32 [N + T, 3] and, where latents are padded, `n_image`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lens_jax import parallel
from lens_jax.data.datasets import DataSets
from lens_jax.data.mixture import Shape
from lens_jax.data.pipeline import batches
from lens_jax.encoders import harmony
from lens_jax.encoders import pixels as pixel_codec
from lens_jax.encoders.frozen import FrozenAutoencoder, FrozenTextEncoder, encode_images, encode_text
from lens_jax.encoders.images import from_uint8
from lens_jax.encoders.pixels import PixelCodecConfig
from lens_jax.encoders.sentence import SentenceEncoder, SentenceEncoderConfig
from lens_jax.encoders.text import TextFeatures
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.tokens import CutCaptions, Tokens, fit_text, positions, token_counts

# Batches the pixel codec's statistics are fitted on.
_FIT_BATCHES = 32


def abstract_batch(config: TrainConfig, images: int, tokens: Tokens, mesh=None) -> dict:
    """Shapes, dtypes and, on a mesh, layouts of what `Features.encode` gives for a batch of so many images."""
    array = functools.partial(parallel.abstract_array, mesh=mesh)
    text_dtype = jnp.float32 if isinstance(config.text, SentenceEncoderConfig) else config.text.model.dtype
    layer = array("text", (images, tokens.text, config.text.width), text_dtype)
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
        self._sentences = SentenceEncoder(config.text) if isinstance(config.text, SentenceEncoderConfig) else None
        if not cached:
            # Better now than when the first batch comes.
            self.autoencoder, self.text_encoder  # noqa: B018

    @functools.cached_property
    def autoencoder(self) -> FrozenAutoencoder | None:
        """The released one, where that is the codec."""
        codec_config = self._config.codec
        return None if isinstance(codec_config, PixelCodecConfig) else FrozenAutoencoder(codec_config, self._mesh)

    @functools.cached_property
    def text_encoder(self) -> FrozenTextEncoder | None:
        """GPT-OSS, where that is the text encoder."""
        return None if self._sentences else FrozenTextEncoder(self._config.text, self._mesh)

    def read(self, batch: dict) -> dict:
        """The host's part, done in the reading threads: captions become features, or ids for a model on the devices.

        Both get the room for text that the batch's shape has.
        """
        batch, tokens = dict(batch), self.counts[Shape.of(batch)]
        if self._cached:
            batch["latents"] = _pad(batch["latents"], tokens.padded)
        elif self._sentences:
            found = self._sentences.encode(batch.pop("captions"))
            batch["text"], batch["text_lengths"] = found.layers, found.lengths
        else:
            batch["ids"], batch["text_lengths"] = self.text_encoder.tokens(batch.pop("captions"))
        lengths = batch["text_lengths"]
        behind = 0 if self._sentences else harmony.SUFFIX_TOKENS
        for name in {"text", "ids"} & batch.keys():
            batch[name] = jax.tree.map(lambda values: fit_text(values, lengths, tokens.text, behind), batch[name])
        batch["text_lengths"] = np.minimum(lengths, np.int32(tokens.text))
        self.cut_captions.add(int((lengths > tokens.text).sum()), len(lengths))
        return batch

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
            static = self._config.codec, self._mesh, tokens.padded, self._config.seed
            batch["latents"] = parallel.on(self._mesh, image_program)(*static, *inputs)
        if "ids" in batch:
            batch["text"] = self._encode_text(tokens.text, batch.pop("ids"), batch["text_lengths"])
        return batch

    def _encode_text(self, room: int, ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
        encoder = self.text_encoder
        static = self._config.text, self._mesh, room
        return parallel.on(self._mesh, text_program)(*static, encoder.params, encoder.past, ids, lengths)

    def codec_params(self, fitted: dict) -> dict:
        """The parameters of the codec, whichever it is: the pixel codec's are `fitted` on the data set."""
        return self.autoencoder.params if self.autoencoder else fitted

    def prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of a few prompts on the host, for samples. All processes must call it."""
        if self._sentences:
            return self._sentences.encode(prompts)
        found = self.text_encoder.features(prompts)
        if self._cached:
            # It has done all it is needed for, and takes 12.6 GB.
            del self.text_encoder
        return found

    def latents(self, fitted: dict, pixels: np.ndarray) -> np.ndarray:
        """Latents [B, N, C] on the host of images uint8 [B, H, W, 3] of one bucket, without padding."""
        batch = {"pixels": pixels, "bucket": pixels.shape[1:3], "text_class": 0, "step": 0}
        tokens = self.counts[Shape.of(batch)]
        return np.asarray(self.encode(fitted, batch)["latents"])[:, : tokens.image]

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """Text tokens of each caption."""
        return (self._sentences.encode if self._sentences else self.text_encoder.tokens)(captions)[1]

    def text(self, captions: Sequence[str], room: int) -> tuple[np.ndarray, np.ndarray]:
        """(features [layers, B, room, width], lengths [B]) on the host of captions of at most `room` tokens."""
        if self._sentences:
            layers, lengths, _ = self._sentences.encode(captions)
        else:
            ids, lengths = self.text_encoder.tokens(captions)
            batch = parallel.place_batch({"ids": ids[:, :room], "text_lengths": lengths}, self._mesh)
            layers = self._encode_text(room, batch["ids"], batch["text_lengths"])
        return np.stack([np.asarray(layer) for layer in layers]), lengths

    def weights(self) -> dict[str, str]:
        """A digest of the weights of each frozen network."""
        networks = {"autoencoder": self.autoencoder, "text_encoder": self.text_encoder}
        return {name: network.digest for name, network in networks.items() if network}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def image_program(config, mesh, padded: int, seed: int, params: dict, pixels: jax.Array, step: jax.Array):
    """uint8 [B, H, W, 3] -> latents [B, padded, C] laid out as a batch's are."""
    if isinstance(config, PixelCodecConfig):
        encode = lambda params, images: pixel_codec.encode(config, params, from_uint8(images))
        if mesh is not None:
            # Each device its rows: a reshape of rows that are spread has no rule of its own.
            rows = PartitionSpec(jax.typeof(pixels).sharding.spec[0])
            encode = jax.shard_map(encode, in_specs=(PartitionSpec(), rows), out_specs=rows)
        latents = encode(params, pixels)
    else:
        # Only where the posterior is sampled; a batch taken again after a resume draws the same.
        key = jax.random.fold_in(jax.random.key(seed), step)
        latents = encode_images(config, mesh, params, pixels, key)
    return _spread("latents", _pad(latents, padded), mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def text_program(config, mesh, room: int, params: dict, past: tuple, ids: jax.Array, lengths: jax.Array):
    """Token ids [B, T] -> feature layers [B, room, width] laid out as a batch's are."""
    layers = encode_text(config, mesh, params, past, ids, lengths)
    return tuple(_spread("text", _pad(layer, room), mesh) for layer in layers)


def _spread(name: str, x: jax.Array, mesh) -> jax.Array:
    return x if mesh is None else jax.reshard(x, parallel.batch_spec(name, x.ndim, mesh))


def _pad(x, length: int):
    """[B, n, C] with zeros behind its n rows up to `length`; of numpy or of JAX."""
    missing = length - x.shape[1]
    if not missing:
        return x
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, ((0, 0), (0, missing), (0, 0)))


def fit_codec(config: TrainConfig, data: DataSets) -> dict:
    """The pixel codec's statistics on the images of the first batches; a released codec brings its own."""
    if not isinstance(config.codec, PixelCodecConfig):
        return {}
    if data.features:
        return {name: np.array(value, np.float32) for name, value in data.features["fitted"].items()}
    reader = batches(data, count=_FIT_BATCHES)
    try:
        return pixel_codec.fit(config.codec, (batch["pixels"] for batch in reader))
    finally:
        reader.close()
