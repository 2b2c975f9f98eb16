"""What pre-training measures of its steps: losses by size and noise level, and the work that was done."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lens_jax import flops
from lens_jax.data.mixture import Shape
from lens_jax.models import attention
from lens_jax.pretraining.config import TrainConfig
from lens_jax.pretraining.loss import NOISE_BINS
from lens_jax.pretraining.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Work:
    """What one optimiser step has to do, over all hosts."""

    # Size of its images, HEIGHTxWIDTH.
    bucket: str
    images: int
    # Image and text tokens that mean something, and all that are computed on.
    tokens: float
    computed_tokens: int
    # Model operations on the former, and what the devices are given to do.
    operations: float
    computed_operations: float


def work(config: TrainConfig, counts: dict[Shape, Tokens], batch: dict, images: int) -> Work:
    """Exact counts for this host's rows of a batch (its shape, `text_lengths`), scaled to the `images` of the whole.

    Captions are dropped on the device, which does not say how many, so the expected number is counted as padding.
    """
    shape = Shape.of(batch)
    tokens, lengths = counts[shape], np.asarray(batch["text_lengths"])
    count, image = len(lengths), tokens.image
    operations = lambda text, images: flops.train_step(config.model, image, text, images, config.lora)
    captioned = sum(operations(int(n), int(images)) for n, images in zip(*np.unique(lengths, return_counts=True)))
    dropped = config.flow.caption_dropout
    kernel = attention.resolve(config.model.attention, config.model.dtype, jax.default_backend())
    model = dataclasses.replace(config.model, attention=kernel)
    computed = model, tokens.padded, tokens.text, images
    return Work(
        bucket=str(shape.bucket),
        images=images,
        tokens=images / count * (image * count + (1 - dropped) * int(lengths.sum())),
        computed_tokens=images * (tokens.padded + tokens.text),
        operations=images / count * ((1 - dropped) * captioned + dropped * operations(0, count)),
        computed_operations=flops.train_step(*computed, config.lora) + flops.recomputation(*computed),
    )


class Meter:
    """Sums over the steps since the last record.

    Batches are counted when they are dispatched, and enter the sums when their step has finished: by then the next
    one has been dispatched too.
    """

    def __init__(self, config: TrainConfig, counts: dict[Shape, Tokens], whole: Callable[[int], int]):
        """`whole`: how many images the batch has of which this host has so many."""
        self._config, self._counts, self._whole = config, counts, whole
        self._dispatched: collections.deque[Work] = collections.deque()
        self._clear()

    def _clear(self):
        self._done: list[Work] = []
        self._by_bucket: dict[str, list[float]] = collections.defaultdict(list)
        self._bin_loss, self._bin_count = np.zeros(NOISE_BINS), np.zeros(NOISE_BINS)

    def dispatch(self, batch: dict) -> None:
        """Count a batch that is about to be dispatched."""
        images = self._whole(len(batch["text_lengths"]))
        self._dispatched.append(work(self._config, self._counts, batch, images))

    def add(self, metrics: dict[str, Any]) -> None:
        """The numbers of the oldest step that was dispatched. Losses of one that is skipped are left out."""
        done = [self._dispatched.popleft() for _ in range(self._config.accumulation)]
        self._done += done
        if metrics["finite"]:
            for part, loss in zip(done, np.asarray(metrics["losses"])):
                self._by_bucket[part.bucket].append(float(loss))
            self._bin_loss += np.asarray(metrics["noise_bin_loss"])
            self._bin_count += np.asarray(metrics["noise_bin_count"])

    def record(self, seconds: float) -> dict[str, Any]:
        """What was added, over the time it took; then the sums start anew. A noise level nobody drew has no loss."""
        with np.errstate(invalid="ignore", divide="ignore"):
            by_noise = self._bin_loss / self._bin_count
        values = {
            "loss_by_noise_level": list(by_noise),
            "loss_by_bucket": {bucket: float(np.mean(self._by_bucket[bucket])) for bucket in sorted(self._by_bucket)},
            **speed(self._done, seconds),
        }
        self._clear()
        return values

    def note(self, values: dict[str, Any]) -> str:
        """Loss and speed."""
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        return (
            f"loss {values['loss']:.4f}  {values['images_per_second']:.1f} images/s  "
            f"{values['tflops_per_second'] * 1e3:.3g} GFLOP/s{mfu}"
        )


def speed(done: list[Work], seconds: float) -> dict[str, float]:
    """Throughput of these steps. Shares of the peak only where it is known.

    MFU counts the trained network's operations on real tokens; HFU also padding and recomputation.
    """
    total = lambda name: sum(getattr(step, name) for step in done)
    devices, peak = jax.device_count(), flops.peak(jax.devices()[0].device_kind)
    rate = total("operations") / seconds
    values = {
        "images_per_second": total("images") / seconds,
        "tokens_per_second": total("tokens") / seconds,
        "tflops_per_second": rate / 1e12,
        "tflops_per_second_per_device": rate / devices / 1e12,
        "padding_share": 1 - total("tokens") / total("computed_tokens"),
    }
    if peak:
        values["mfu"] = rate / devices / peak
        values["hfu"] = total("computed_operations") / seconds / devices / peak
    return values
