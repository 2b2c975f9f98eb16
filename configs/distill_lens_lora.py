"""Lens becomes Lens-Turbo on one GPU: adapters of student and fake score beside one frozen base, which is the teacher.

lens-jax plan distill_lens_lora --hardware h100 --devices 1
lens-jax distill distill_lens_lora --init-from checkpoints/Lens --data.path data/curated

As configs/distill_lens.py, with adapters of rank 64 in place of all parameters, at a rate that adapters are usual with;
an update is of eight batches of four images. The report trains all parameters. Not run by us.
"""

import dataclasses

from lens_jax.configs.distill_lens import config as full
from lens_jax.models.lora import LoraConfig

_RATE = 5e-5

config = dataclasses.replace(
    full,
    out="runs/distill_lens_lora",
    lora=LoraConfig(rank=64, alpha=64, targets=("attention", "mlp")),
    accumulation=8,
    data=dataclasses.replace(full.data, batch_size=4),
    optimizer=dataclasses.replace(full.optimizer, learning_rate=_RATE),
    fake_optimizer=dataclasses.replace(full.fake_optimizer, learning_rate=_RATE),
)
