"""Lens-Base becomes Lens: the report's reinforcement learning (its section 4), 180 steps on 64 GPUs.

lens-jax plan rl_lens --hardware a100-80 --devices 64
srun lens-jax rl rl_lens --init-from checkpoints/Lens-Base --prompts data/rl/prompts.jsonl

DiffusionNFT on 48 prompts an epoch, 24 images each at the nine sizes of 1024 x 1024, an update an epoch; an adapter of
rank 64 and alpha 128, AdamW at 3e-4, beta 1, KL 1e-4: the report's. It does not say how images are drawn, where the
adapter is and how answers become a reward: 10 steps of a second-order solver without guidance, attention and MLPs, and
their mean, as the reference code of DiffusionNFT or by the natural reading. The judge sees every rubric of an image in
a question of its own, as in the report: 12,672 an epoch, 2.3 million in all; `call="all"` asks once an image. There is
neither a released prompt set nor a judge: `lens-jax prompts` makes a set in the report's manner, and any vision model
behind an OpenAI-compatible endpoint can judge. At 35 % of the peak of 64 A100s about 8 hours (`lens-jax plan`). Not run
by us.
"""

from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import LoraConfig
from lens_jax.parallel import MeshConfig
from lens_jax.posttraining.nft import NftConfig
from lens_jax.posttraining.rewards.combine import RewardsConfig, Weighted
from lens_jax.posttraining.rewards.rubric import RubricJudge
from lens_jax.posttraining.rl_config import EvaluationConfig, RlConfig, RolloutConfig
from lens_jax.pretraining.config import SheetConfig
from lens_jax.run.config import CheckpointConfig, LoggingConfig
from lens_jax.run.optimizer import OptimizerConfig

config = RlConfig(
    out="runs/rl_lens",
    steps=180,
    ema_decay=0.9,
    lora=LoraConfig(rank=64, alpha=128, targets=("attention", "mlp")),
    rollout=RolloutConfig(
        groups=48,
        images=24,
        sizes=("lens-1024",),
        # One image a device, which is as much as it can do: 4,232 tokens keep it busy.
        batch_size=64,
        joint_multiple=128,
    ),
    nft=NftConfig(beta=1.0, kl=1e-4, z_c=5.0, timesteps=0.99, old_decay=1),
    rewards=RewardsConfig(train=(Weighted(RubricJudge(call="each")),)),
    evaluation=EvaluationConfig(every=30),
    model=DenoiserConfig(),
    codec=FluxCodecConfig(),
    text=GptOssTextConfig(),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=0, weight_decay=1e-4, clip_norm=1.0),
    # Weights are sharded within a node of eight and replicated across nodes.
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=10, keep=3),
    samples=SheetConfig(every=30),
    logging=LoggingConfig(every=1),
)
