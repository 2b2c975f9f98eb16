"""PyTorch's DataLoader over picture files with PIL, as one would write it: what `lens-jax bench data` times."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

# Path, and the height and width to crop to.
Item = tuple[Path, int, int]


class PictureFiles(Dataset):
    """uint8 [H, W, 3] tensors of pictures resized to cover their size and cropped to its centre."""

    def __init__(self, items: Sequence[Item]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        path, height, width = self.items[index]
        with Image.open(path) as file:
            picture = file.convert("RGB")
        if picture.size != (width, height):
            scale = max(width / picture.width, height / picture.height)
            left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
            box = (left, top, picture.width - left, picture.height - top)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
        return torch.from_numpy(np.array(picture))


def loader(batches: Sequence[Sequence[Item]], workers: int) -> DataLoader:
    """The batches in their order, uint8 [B, H, W, 3] each. Workers stay, so that a second pass starts at once."""
    rows = itertools.count()
    return DataLoader(
        PictureFiles([item for batch in batches for item in batch]),
        batch_sampler=[[next(rows) for _ in batch] for batch in batches],
        num_workers=workers,
        persistent_workers=True,
        # Not forked from a process with JAX's threads.
        multiprocessing_context="forkserver",
    )
