"""The report's reinforcement learning on a node of eight GPUs: one question an image, a fifth of the noise levels.

lens-jax plan rl_lens_8gpu
lens-jax rl rl_lens_8gpu --init-from checkpoints/Lens-Base --prompts data/rl/prompts.jsonl

As `rl_lens`, in everything that decides what is learnt but two: an image is trained at two of the ten noise levels, as
Flow-Factory's recipe for images of this size does, and the judge is asked about all rubrics of an image at once. Both
are options (--nft.timesteps 0.99). `lens-jax plan` says how long it takes. Not run by us.
"""

import dataclasses

from lens_jax.configs.rl_lens import config as report
from lens_jax.parallel import MeshConfig
from lens_jax.posttraining.nft import NftConfig
from lens_jax.posttraining.rewards.combine import RewardsConfig, Weighted
from lens_jax.posttraining.rewards.rubric import RubricJudge

config = dataclasses.replace(
    report,
    out="runs/rl_lens_8gpu",
    nft=NftConfig(timesteps=0.2),
    # Two images a device.
    rollout=dataclasses.replace(report.rollout, batch_size=16),
    rewards=RewardsConfig(train=(Weighted(RubricJudge(call="all")),)),
    mesh=MeshConfig(data=1, fsdp=-1),
)
