"""What programs put in front of, and between, the names of a network's tensors, and files that are no network."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from lens_jax.convert.table import Spec, Tensors, shown, specs_of
from lens_jax.errors import LensError

# In front, one or several (release 6.1; torch.compile, DataParallel, PEFT, trainers of other models).
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "model.",
    "module.",
    "net.",
    "dit.",
    "base_model.",
    "_orig_mod.",
    "first_stage_model.",
    "vae.",
)
# How the other components of a bundle begin; text encoders are never stripped here.
BUNDLED = (*PREFIXES, "text_encoders.", "text_encoder.", "cond_stage_model.", "conditioner.")

_KNOWN = re.compile("(?:" + "|".join(map(re.escape, PREFIXES)) + ")*")
# Modules that wrap a module and leave its tensors as they are.
_WRAPPER = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LORA = re.compile(r"\.(?:lora_(?:A|B|up|down)|lokr_w[12]|hada_w[12]|oft_|dora_scale)|\.lora_magnitude|\.base_layer\.")


def refuse_lora(names: Iterable[str], source: str) -> None:
    """LensError for a file of changes to a network and not of a network."""
    name = next((name for name in names if _LORA.search(name)), None)
    if name:
        raise LensError(
            f"{source}: holds a LoRA ({shown(name)}), changes to a denoiser and not a denoiser; give it beside its "
            "model: --lora FILE[:scale], or load_lora_weights"
        )


def unwrapped(tensors: Tensors) -> Tensors:
    """The same tensors without what torch.compile, FSDP and checkpointing write into the middle of names."""
    names = {name: _WRAPPER.sub("", name) for name in tensors}
    if all(new == name for name, new in names.items()) or len(set(names.values())) < len(names):
        return tensors
    origin = {new: name for name, new in names.items()}
    return Tensors({new: tensors.specs[name] for new, name in origin.items()}, lambda new: tensors[origin[new]])


def strip(tensors: Mapping[str, np.ndarray], wanted: Iterable[str], source: str) -> Tensors:
    """Tensors without the prefixes of `PREFIXES`, one or several, that fit most of the `wanted` names.

    Other components of a bundle are left out; anything else stays, to be reported. LensError where most names begin
    with something that is not known.
    """
    specs, wanted = specs_of(tensors), list(wanted)
    some = wanted[:: max(1, len(wanted) // 12)]
    heads = {"", *(name[: -len(end)] for end in some for name in specs if name.endswith(end))}
    counts = {head: sum(head + name in specs for name in wanted) for head in heads}
    known = {head: count for head, count in counts.items() if _KNOWN.fullmatch(head)}
    prefix, other = max(sorted(known), key=known.get), max(sorted(counts), key=counts.get)
    if counts[other] > len(wanted) // 2 > known[prefix] and other.endswith("."):
        raise LensError(
            f"{source}: its names begin with the prefix {shown(other)}, which is not known; rename them, or accepted "
            f"are {', '.join(PREFIXES)} and several of these"
        )
    if not prefix or not known[prefix]:
        return Tensors(specs, tensors.__getitem__)
    origin = {}
    for name in specs:
        if name.startswith(prefix):
            origin[name[len(prefix) :]] = name
        elif not name.startswith(BUNDLED):
            origin.setdefault(name, name)
    return Tensors({name: specs[old] for name, old in origin.items()}, lambda name: tensors[origin[name]])


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """The same tensors, those in `names` (old to new) under their new names."""
    origin = {names.get(name, name): name for name in tensors}
    return Tensors({new: tensors.specs[old] for new, old in origin.items()}, lambda new: tensors[origin[new]])


def stacked(tensors: Tensors, groups: Mapping[str, tuple[str, ...]]) -> Tensors:
    """The same tensors, those of each group (by its new name) one after another along their first axis."""
    gone = {name for names in groups.values() for name in names}
    specs = {name: spec for name, spec in tensors.specs.items() if name not in gone}
    for new, names in groups.items():
        parts = [tensors.specs[name] for name in names]
        alike = len({part.shape[1:] for part in parts}) == 1 and all(part.shape for part in parts)
        if not alike:
            specs.update({name: tensors.specs[name] for name in names})  # to be reported
            continue
        dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else np.dtype(np.float32)
        specs[new] = Spec(dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]))

    def read(name: str) -> np.ndarray:
        if name not in groups or name in tensors:
            return tensors[name]
        return np.concatenate([np.array(tensors[part]).astype(specs[name].dtype) for part in groups[name]])

    return Tensors(specs, read)
