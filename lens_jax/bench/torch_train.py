"""A training step of the denoiser in plain eager PyTorch, as one would write it: what `lens-jax bench train` times."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_jax.bench.torch_denoiser import TorchDenoiser
from lens_jax.diffusion.flow import noise_level_mu
from lens_jax.pretraining.config import TrainConfig


class TorchTrainer:
    """Model, optimiser and moving average; `step` is one update on a batch of one bucket."""

    def __init__(self, config: TrainConfig, grid: tuple[int, int], device: str):
        self.config, self.grid = config, grid
        self.model = TorchDenoiser(config.model).to(device).train()
        parameters = dict(self.model.named_parameters())
        # As `training.optimizer.decay_mask`: matrices decay, norms and biases do not.
        groups = [
            {"params": [p for p in parameters.values() if (p.ndim > 1) == matrices], "weight_decay": decay}
            for matrices, decay in ((True, config.optimizer.weight_decay), (False, 0.0))
        ]
        o = config.optimizer
        # Fused is the fastest of PyTorch's three, on a CPU too.
        self.optimizer = torch.optim.AdamW(groups, o.learning_rate, (o.beta1, o.beta2), o.eps, fused=True)
        self.parameters = list(parameters.values())
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, latents: Tensor, text: Sequence[Tensor], lengths: Tensor) -> float:
        """Take a step; returns the loss."""
        flow = self.config.flow
        batch, tokens, _ = latents.shape
        t = torch.sigmoid(noise_level_mu(flow, tokens) + flow.std * torch.randn(batch, device=latents.device))
        noise = torch.randn_like(latents)
        lengths = torch.where(torch.rand(batch, device=latents.device) < flow.caption_dropout, 0, lengths)
        mask = torch.arange(text[0].shape[1], device=latents.device) < lengths[:, None]
        noisy = torch.lerp(latents, noise, t[:, None, None])
        loss = (self.model(noisy, text, t, self.grid, mask).float() - (noise - latents)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.config.ema_decay)
        return loss.item()
