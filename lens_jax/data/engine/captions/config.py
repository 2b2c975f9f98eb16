"""What captions are asked for, of whom, and what is sent."""

import dataclasses
import math
from typing import Literal

from lens_jax.errors import LensError
from lens_jax.llm.endpoint import Endpoint

KINDS = ("dense", "brief", "mixed")


@dataclasses.dataclass(frozen=True)
class Caption:
    """The model that writes captions (report, section 2), behind any endpoint that speaks OpenAI's protocol."""

    # Who is asked, how hard, at what price and up to what budget. The report's captions are of GPT-4.1.
    endpoint: Endpoint = Endpoint(url="https://api.openai.com/v1", model="gpt-4.1")
    # Asked about the images that the first one refuses; None asks nobody.
    second: Endpoint | None = None
    # One call an image, or files of calls that are answered within a day, at OpenAI for half the price.
    mode: Literal["online", "batch"] = "online"
    # "dense" captions as the report trains on, "brief" ones, or "mixed": either of them by lot, for its ablation.
    kinds: tuple[str, ...] = ("dense",)
    # Where both dense and brief are wanted: both in one call, or the brief one of the dense one's text.
    brief_of: Literal["image", "text"] = "image"
    # Images are sent as JPEGs of this quality, with a short side of at most so many pixels.
    short_side: int = 768
    quality: int = 85
    # None leaves it to the server: some models refuse any.
    temperature: float | None = 0.2
    # Longest answer in tokens. Models that reason need more.
    max_tokens: int = 900
    # Times that an image is asked about until its caption is accepted, each with another seed.
    asks: int = 3
    # For the forecast: tokens of an image, tokens of each of its tiles, and the side of a tile in pixels. The default
    # is of GPT-4.1; (0, 1, 28) is of Qwen-VL.
    image_tokens: tuple[float, float, int] = (85, 170, 512)
    # For the forecast: tokens of a dense answer; a brief one is taken to have an eighth.
    answer_tokens: int = 145
    # A text that more images than this have is no caption of any of them.
    most_alike: int = 50
    # Files of calls that the server may work on at once; only for mode="batch".
    batches: int = 20
    # Seconds between two looks at them.
    poll_seconds: float = 60.0

    def __post_init__(self):
        least = {
            "short_side": 64, "quality": 1, "max_tokens": 1, "asks": 1, "answer_tokens": 1, "most_alike": 1,
            "batches": 1, "poll_seconds": 0.001,
        }  # fmt: skip
        for name, number in least.items():
            if not number <= getattr(self, name) < math.inf:
                raise LensError(f"caption.{name} is {getattr(self, name)}; it must be at least {number}")
        if self.quality > 100:
            raise LensError(f"caption.quality is {self.quality}; it must be at most 100")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise LensError(f"caption.temperature is {self.temperature}; it must lie within 0 to 2, or be None")
        base, tile, side = self.image_tokens
        if not (0 <= base < math.inf and 0 <= tile < math.inf and side >= 1):
            raise LensError(f"caption.image_tokens is {self.image_tokens}; two numbers from 0 and a side from 1")
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) != len(self.kinds):
            raise LensError(f"caption.kinds is {self.kinds}; accepted: some of {', '.join(KINDS)}")
        if "mixed" in self.kinds and len(self.kinds) > 1:
            raise LensError('caption.kinds: "mixed" has dense and brief ones in it, and stands alone')
        for name in ("endpoint", "second"):
            endpoint = getattr(self, name)
            if endpoint is not None and endpoint.cache:
                raise LensError(f"caption.{name}.cache: leave it empty; answers are kept in the work folder")
