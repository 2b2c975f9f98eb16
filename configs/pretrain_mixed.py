"""Stage 2 of the report's pre-training: 27 sizes of three areas in nine ratios, 400,000 updates, from stage 1.

lens-jax prepare folder --path IMAGES --out data/stage2 --buckets lens-pretraining \
    --caption-classes 128 160 216 256 288 344 --tokenizer checkpoints/Lens-Base/tokenizer
lens-jax plan pretrain_mixed --hardware h100 --devices 128
srun lens-jax train pretrain_mixed --init-from runs/pretrain_512

In the report every one of 128 ranks takes 24, 10 or 6 images of one size, different ranks different sizes, and all
count alike. Here a micro-step has one size on all devices, and an update adds up three: about as many images (1,792
for 1,707; the areas equally often, an image in every one that it covers), the same expected gradient. 8, 4 and 2 images
a device, not 8, 3.3 and 2: that divides, and the micro-steps of the three areas then take about equally long (29, 34
and 34 TFLOP forward a device of 128). 1.49e22 operations: at 40 % of the peak of 128 H100s 82 hours, encoders not
counted. Not run by us.
"""

import dataclasses

from lens_jax.configs.pretrain_512 import config as stage1
from lens_jax.run.optimizer import OptimizerConfig

config = dataclasses.replace(
    stage1,
    out="runs/pretrain_mixed",
    accumulation=3,
    weighting="batch",
    data=dataclasses.replace(
        stage1.data,
        path="data/stage2",
        buckets=("lens-pretraining",),
        # An image is stored at the largest size that it covers, and serves all areas up to that.
        areas="all",
        area_weights=(1, 1, 1),
        batch_sizes=(1024, 512, 256),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=2000),
)
