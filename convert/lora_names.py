"""How others name the tensors of an adapter of the denoiser (release 6.5), and how each style writes them."""

import dataclasses
import re
from typing import Literal

from lens_jax.convert.prefixes import PREFIXES
from lens_jax.models.denoiser import DenoiserConfig
from lens_jax.models.lora import MODULES

Style = Literal["comfy", "peft", "diffusers", "kohya"]
STYLES: tuple[Style, ...] = ("comfy", "peft", "diffusers", "kohya")

# Names that others give to modules of a block, for those of the release (see `convert.denoiser`).
_OTHER = {
    "img_mod.1": ("img_mod",),
    "txt_mod.1": ("txt_mod",),
    "attn.to_out.0": ("attn.to_out",),
}
# The parts that some keep apart of a fused projection: q, k, v.
_PARTS = {
    "attn.img_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.txt_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_KOHYA = ("lora_unet_", "lora_transformer_", "lycoris_")
# `lora_A.<name>.weight` is what PEFT has in memory, `lora.down` what old diffusers wrote.
_FACTOR = re.compile(r"(.+)\.(?:(lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight")
_OTHERS = re.compile(r"(.+)\.(alpha|lokr_w[12](?:_[ab])?)")


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer of the release."""

    # Its name there, `transformer_blocks.3.attn.img_qkv`.
    name: str
    # The layer of ours, `blocks/image/qkv`.
    path: str
    # Which block, and which of the modules that share a layer of ours; None where there is one.
    block: int | None
    pair: int | None


def modules(config: DenoiserConfig) -> dict[str, Module]:
    """Every module of the release that can have an adapter, by name, in the order of `models.lora.MODULES`."""
    found = {}
    for path, names in MODULES.items():
        for block in range(config.layers) if path.startswith("blocks/") else (None,):
            for pair, name in enumerate(names):
                name = name if block is None else f"transformer_blocks.{block}.{name}"
                found[name] = Module(name, path, block, pair if len(names) > 1 else None)
    return found


class Names:
    """What the names of a file mean for a model of some size."""

    def __init__(self, config: DenoiserConfig):
        self._known: dict[str, tuple[str, int | None]] = {}
        for name in modules(config):
            self._known[name] = name, None
            for ours, others in _OTHER.items():
                self._known.update({name.replace(ours, other): (name, None) for other in others if ours in name})
            for ours, parts in _PARTS.items():
                if ours in name:
                    self._known.update({name.replace(ours, part): (name, i) for i, part in enumerate(parts)})
        # Underscores cannot be told from dots, so by what there is.
        self._flat = {name.replace(".", "_"): meant for name, meant in self._known.items()}

    def read(self, key: str) -> tuple[str, int | None, str] | None:
        """(module of the release, its part of q, k, v or None for all, "A", "B", "alpha" or "lokr_...") of a tensor."""
        if found := _FACTOR.fullmatch(key):
            meant, kind = self._module(found[1]), "A" if found[2] else "B"
        elif found := _OTHERS.fullmatch(key):
            meant, kind = self._module(found[1]), found[2]
        else:
            return None
        return meant and (*meant, kind)

    def _module(self, name: str) -> tuple[str, int | None] | None:
        for start in _KOHYA:
            if name.startswith(start):
                return self._flat.get(name.removeprefix(start))
        while name not in self._known:
            start = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
            if start is None:
                return None
            name = name.removeprefix(start)
        return self._known[name]


def written(style: Style, module: str) -> tuple[str, str, str | None]:
    """Names of A, B and alpha of a module in a style; PEFT and diffusers keep alpha elsewhere."""
    if style == "kohya":
        start = f"{_KOHYA[0]}{module.replace('.', '_')}"
        return f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha"
    start = {"comfy": "diffusion_model.", "peft": "base_model.model.", "diffusers": "transformer."}[style] + module
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight", f"{start}.alpha" if style == "comfy" else None
