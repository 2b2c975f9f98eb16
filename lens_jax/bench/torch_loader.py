"""PyTorch's DataLoader over image files with PIL, as one would write it: what `lens-jax bench data` times."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

# Path, and the height and width to crop to.
Item = tuple[Path, int, int]


class ImageFiles(Dataset):
    """uint8 [H, W, 3] tensors of images resized to cover their size and cropped to its centre."""

    def __init__(self, items: Sequence[Item]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        path, height, width = self.items[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        if image.size != (width, height):
            scale = max(width / image.width, height / image.height)
            left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
            box = (left, top, image.width - left, image.height - top)
            image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
        return torch.from_numpy(np.array(image))


def loader(batches: Sequence[Sequence[Item]], workers: int) -> DataLoader:
    """The batches in their order, uint8 [B, H, W, 3] each. Workers stay, so that a second pass starts at once."""
    rows = itertools.count()
    return DataLoader(
        ImageFiles([item for batch in batches for item in batch]),
        batch_sampler=[[next(rows) for _ in batch] for batch in batches],
        num_workers=workers,
        persistent_workers=True,
        # Not forked from a process with JAX's threads.
        multiprocessing_context="forkserver",
    )
