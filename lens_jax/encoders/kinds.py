"""The image codecs and text encoders that a config may name; a new one is its file and its name here."""

from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.encoders.linear import LinearCodecConfig
from lens_jax.encoders.sentence import SentenceEncoderConfig

Images = LinearCodecConfig | FluxCodecConfig
Text = SentenceEncoderConfig | GptOssTextConfig
