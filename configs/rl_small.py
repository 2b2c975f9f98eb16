"""Reinforcement learning on the small Lens that comes with the package: three or four objects in places, counts of
four, and words, judged exactly from the pixels.

lens-jax prompts scenes --out data/prompts/small
lens-jax rl rl_small
lens-jax evaluate --bench scenes --checkpoint runs/rl_small --guidance-scale 1

DiffusionNFT as the report has it (beta 1, KL 1e-4, a second-order solver, no guidance), in small: 12 prompts an epoch,
12 images each, an update an epoch, 80 of them. Each image is trained at three of its ten noise levels. The old policy
is the trained one (--nft.old-decay 1, the report's, would keep 8 % of it at most in 80 updates): a pass less.

Meant to end within 20 minutes on two cores; reckoned, not yet measured. `lens-jax plan rl_small` counts 0.57 TFLOP of
drawing (144 images, 10 passes each) and 0.52 of training (432 samples, two forward passes and a backward one through
frozen weights) an update: 8 s at 130 GFLOP/s of both cores. Judging takes 28 ms of a core an image, 2 s; so 80 updates
take 14 minutes. Each of three evaluations, of 192 held-out prompts with four images, takes 45 s. One size, so that few
programs are compiled; others by --rollout.sizes, with prompts made for the same --sizes.

The reward is the share of what a prompt asks for that an image shows. `passes`, which is 1 where it shows all of it, is
only measured, on prompts whose combinations are neither in the set nor in pre-training; by category in `evaluation`
records of metrics.jsonl. The report's two ablations, a command each and the set for it:

lens-jax prompts subset data/prompts/small data/prompts/quarter.jsonl --fraction 0.25
lens-jax rl rl_small --prompts data/prompts/quarter.jsonl --out runs/rl_small_quarter
lens-jax prompts subset data/prompts/small data/prompts/no-text.jsonl --without text
lens-jax rl rl_small --prompts data/prompts/no-text.jsonl --out runs/rl_small_no_text
"""

from lens_jax.configs.small import config as small
from lens_jax.models.lora import LoraConfig
from lens_jax.posttraining.nft import NftConfig
from lens_jax.posttraining.rewards.combine import RewardsConfig, Weighted
from lens_jax.posttraining.rewards.scene import SceneChecker, SceneOpinion
from lens_jax.posttraining.rl_config import EvaluationConfig, RlConfig, RolloutConfig
from lens_jax.pretraining.config import SheetConfig
from lens_jax.run.config import CheckpointConfig, LoggingConfig
from lens_jax.run.optimizer import OptimizerConfig

config = RlConfig(
    out="runs/rl_small",
    init_from="small",
    prompts="data/prompts/small",
    steps=40,
    ema_decay=0.9,
    # The report's rank is a 48th of its width and its alpha twice the rank; 4 would be that of this width.
    lora=LoraConfig(rank=16, alpha=32, targets=("attention", "mlp")),
    rollout=RolloutConfig(groups=8, images=12, sizes=("64x64",), batch_size=48, num_inference_steps=6),
    nft=NftConfig(beta=1.0, kl=1e-4, z_c=5.0, timesteps=0.34, old_decay=0),
    rewards=RewardsConfig(
        train=(Weighted(SceneChecker("scene", "share")),),
        evaluation=(SceneChecker("passes", "all"), SceneOpinion()),
    ),
    # As it is trained, so that no other program is compiled.
    evaluation=EvaluationConfig(every=20, prompts="data/prompts/small/held_out.jsonl", images=4, num_inference_steps=6),
    model=small.model,
    codec=small.codec,
    text=small.text,
    # Three times the report's rate, for half as many updates of a model a thousandth as large.
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=1e-4, clip_norm=1.0),
    checkpoint=CheckpointConfig(every=10, keep=2),
    samples=SheetConfig(every=40, guidance_scale=1.0),
    logging=LoggingConfig(every=1),
)
