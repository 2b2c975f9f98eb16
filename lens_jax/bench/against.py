"""The PyTorch side of the benchmarks: the same sizes, random weights, eager, on its GPU where torch sees one.

Torch and its libraries are imported here only. Each function returns a run of no arguments that has finished, on a GPU
too, when it returns.
"""

import importlib
import importlib.metadata
from collections.abc import Callable

import jax
import numpy as np

from lens_jax.errors import LensError
from lens_jax.models.autoencoder import AutoencoderConfig
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.gpt_oss import GptOssConfig
from lens_jax.pretraining.config import TrainConfig


def versions(*packages: str) -> str:
    """E.g. "torch 2.13.0, diffusers 0.42.1"."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def denoiser(config: DenoiserConfig, latents, text, t, grid: tuple[int, int]) -> Callable:
    """A forward pass of `reference.torch_denoiser` on these inputs."""
    torch = _import("torch")
    from lens_jax.bench.torch_denoiser import TorchDenoiser

    model = _ready(TorchDenoiser(config), config.dtype)
    arguments = _tensor(latents), [_tensor(layer) for layer in text], _tensor(t)
    return _run(lambda: model(*arguments, grid), torch)


def train(config: TrainConfig, batch: dict, grid: tuple[int, int]) -> Callable:
    """A training step of `reference.torch_denoiser`: forward, backward, clip, AdamW, moving average."""
    torch = _import("torch")
    from lens_jax.bench.torch_train import TorchTrainer

    trainer = TorchTrainer(config, grid, _device(torch))
    latents, layers = _tensor(batch["latents"]), [_tensor(layer) for layer in batch["text"]]
    lengths = _tensor(batch["text_lengths"])
    return _run(lambda: trainer.step(latents, layers, lengths), torch, inference=False)


def text(config: GptOssConfig, ids) -> Callable:
    """The layers of transformers' GptOssModel, without its vocabulary head. Its experts are not packed."""
    torch = _import("torch")
    transformers = _import("transformers")
    values = transformers.GptOssConfig(
        num_hidden_layers=config.layers,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        num_local_experts=config.experts,
        num_experts_per_tok=config.experts_per_token,
        vocab_size=config.vocab,
        sliding_window=config.window,
        attn_implementation="eager",
    )
    with torch.device(_device(torch)):
        model = transformers.GptOssModel._from_config(values, dtype=getattr(torch, config.dtype)).eval()
    with torch.no_grad():
        # As models.gpt_oss.init: norms of one and a router that spreads the tokens, or fewer experts would run.
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.02)
    tokens = _tensor(ids).long()
    return _run(lambda: model(tokens, use_cache=False), torch)


def autoencoder(config: AutoencoderConfig, batch: int, grid: tuple[int, int], encode: bool) -> Callable:
    """diffusers' AutoencoderKLFlux2 from cells to images, or to the moments of cells."""
    torch = _import("torch")
    diffusers = _import("diffusers")
    stages = len(config.widths)
    model = diffusers.AutoencoderKLFlux2(
        block_out_channels=config.widths,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=config.layers,
        latent_channels=config.cell_channels,
        norm_num_groups=config.groups,
    )
    model = _ready(model, config.dtype)
    side = config.tile if encode else config.patch
    shape = (batch, 3 if encode else config.cell_channels, grid[0] * side, grid[1] * side)
    inputs = torch.randn(shape, dtype=getattr(torch, config.dtype), device=_device(torch))
    return _run(lambda: (model.encode if encode else model.decode)(inputs), torch)


def loader(batches: list, workers: int) -> Callable:
    """A pass of `reference.torch_loader` over these batches of image files."""
    _import("torch")
    from lens_jax.bench import torch_loader

    passes = torch_loader.loader(batches, workers)

    def run() -> None:
        for _ in passes:
            pass

    return run


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LensError(f"--against torch needs {name} ({error}): pip install 'lens-jax[parity]'") from None


def _device(torch) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _ready(model, dtype: str):
    import torch

    return model.to(device=_device(torch), dtype=getattr(torch, dtype)).eval()


def _tensor(array: jax.Array):
    """A copy on torch's device; over float32, since numpy's bfloat16 is not torch's."""
    import torch

    array = np.asarray(array)
    name = str(array.dtype)
    array = array.astype(np.float32) if name == "bfloat16" else array.copy()
    return torch.from_numpy(array).to(device=_device(torch), dtype=getattr(torch, name))


def _run(function: Callable, torch, inference: bool = True) -> Callable:
    def run() -> None:
        with torch.inference_mode(inference):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run
