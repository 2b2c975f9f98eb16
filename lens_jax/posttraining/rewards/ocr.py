"""Whether the texts of a prompt can be read in the image, by a text reader on this machine (rapidocr)."""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.reward import Score
from lens_jax.posttraining.rewards.text_match import fold, similarity, word_accuracy, words


@dataclasses.dataclass(frozen=True)
class Ocr:
    """A text reader that looks for the texts of a prompt. Prompts without texts it leaves to other rewards."""

    # Of the reward, in logs.
    name: str = "ocr"
    # "letters": 1 - edit distance / length, mean over the texts. "words": share of their words that are there. Both are
    # logged. The first also tells a nearly right word from a wrong one, so groups tie less often.
    measure: Literal["letters", "words"] = "letters"
    # Whether "Open" and "OPEN" differ. Readers confuse the cases of some letters (s, o, w, ...).
    case: bool = False
    # Readers at work at once, each with one core. Every one loads its own networks, 31 MB.
    readers: int = 2

    def __post_init__(self):
        if self.readers < 1:
            raise LensError(f"ocr: readers is {self.readers}; it must be at least 1")

    def load(self) -> "OcrReward":
        return OcrReward(self)


class OcrReward:
    """`<name>`, and beside it `<name>/letters`, `<name>/words`, and `<name>/extra`: the share of the words that were
    read and not wanted, which a model that writes the text all over the image drives up."""

    def __init__(self, config: Ocr):
        self.config = config
        self.name = config.name
        self._readers = [_Reader() for _ in range(config.readers)]
        self._free = threading.Semaphore(config.readers)
        self._lock = threading.Lock()

    def check(self) -> None:
        """Loads a reader."""
        self._readers[0].load()

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Score]:
        return [self._score(image, prompt) if prompt.texts else Score() for image, prompt in zip(images, prompts)]

    def close(self) -> None:
        self._readers = []

    def _score(self, image: np.ndarray, prompt: Prompt) -> Score:
        try:
            found = self._read(image)
        except LensError:
            raise
        except Exception as error:  # of one image; the reader is C++ behind several packages
            return Score(error=f"the text reader failed: {type(error).__name__}: {' '.join(str(error).split()):.200}")
        values = compare(prompt.texts, found, self.config.case)
        named = {f"{self.name}/{what}": value for what, value in values.items()}
        return Score({self.name: values[self.config.measure], **named})

    def _read(self, image: np.ndarray) -> list[str]:
        with self._free:
            with self._lock:
                reader = self._readers.pop()
            try:
                return reader.read(image)
            finally:
                with self._lock:
                    self._readers.append(reader)


def compare(texts: Sequence[str], found: Sequence[str], case: bool) -> dict[str, float]:
    """`letters`, `words` and `extra` of the lines that were read, in reading order, against the texts wanted."""
    wanted = [fold(text, case) for text in texts]
    read = fold(" ".join(found), case)
    want, have = [word for text in wanted for word in words(text)], words(read)
    return {
        "letters": sum(similarity(text, read) for text in wanted) / len(wanted),
        "words": word_accuracy(want, have),
        "extra": 1 - word_accuracy(have, want) if have else 0.0,
    }


class _Reader:
    """One copy of the networks, loaded when it is first used."""

    def __init__(self):
        self._engine = None

    def load(self):
        if self._engine is None:
            try:
                from rapidocr import RapidOCR
            except ImportError as error:
                raise LensError(f'reading text needs the extra: pip install "lens-jax[ocr]" ({error})') from None
            # Of several readers each has its core; and its lines for every file that it opens are not ours to print.
            threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
            self._engine = RapidOCR(params={"Global.log_level": "critical", **threads})
        return self._engine

    def read(self, image: np.ndarray) -> list[str]:
        """The lines in an image uint8 [H, W, 3], from the top left to the bottom right."""
        # It takes arrays to be of OpenCV's channel order.
        found = self.load()(np.ascontiguousarray(image[..., ::-1]))
        return list(getattr(found, "txts", None) or ())
