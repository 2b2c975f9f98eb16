"""Adapter files that people have, read and written: ComfyUI, PEFT, diffusers, kohya; LoKr is read.

What a file holds is seen by its names (`lora_names`). alpha is a tensor a module, or is in `adapter_config.json` (PEFT)
or in the header; where it is nowhere it is the rank.
"""

import collections
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lens_jax.atomic import new_directory, write_json
from lens_jax.convert import folder, lora, writer
from lens_jax.convert.lora import Adapter, Kronecker
from lens_jax.convert.lora_names import STYLES, Names, Style, written
from lens_jax.convert.table import FLOATS, Spec, Tensors, shown
from lens_jax.errors import LensError
from lens_jax.models.denoiser import DenoiserConfig

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# Where diffusers keeps PEFT's config: in the header, as JSON.
_DIFFUSERS_HEADER = "lora_adapter_metadata"
# Names in headers, ours first.
_BASE = ("base_model", "ss_sd_model_name")
_TRIGGER = ("trigger_text", "modelspec.trigger_phrase", "trigger_words")
_ALPHA = ("alpha", "lora_alpha", "ss_network_alpha")


def read(path: Path, config: DenoiserConfig) -> Adapter:
    """The adapter in a file, or in a folder as PEFT or diffusers writes it, for a denoiser of this size.

    Raises LensError that lists every tensor that means nothing here; and for one of another model, of mixed ranks, or
    with numbers that are not finite.
    """
    path = _file(Path(path))
    file, names = folder.open_file(path), Names(config)
    found: dict[tuple[str, int | None], dict[str, str]] = collections.defaultdict(dict)
    unknown, twice = [], []
    for key in file:
        meant = names.read(key)
        if meant is None:
            unknown.append(key)
        elif meant[2] in found[meant[:2]]:
            twice.append(key)
        else:
            found[meant[:2]][meant[2]] = key
    if unknown:
        raise LensError(f"{path}: {len(unknown)} of {len(file)} tensors mean nothing in this model or are of a kind "
                        f"that is not read: {', '.join(map(shown, unknown))}")  # fmt: skip
    if twice or not found:
        raise LensError(f"{path}: {shown(twice[0])} is there twice" if twice else f"{path}: holds no adapter")
    for key in file:
        if file[key].dtype not in FLOATS:
            raise LensError(f"{path}: {shown(key)} is {file[key].dtype}; accepted: {', '.join(map(str, FLOATS))}")
    said = _Said(path, file.metadata)
    size = lora.sizes(config)
    low = {at: keys for at, keys in found.items() if keys.keys() & {"A", "B"}}
    high = {at: keys for at, keys in found.items() if any(kind.startswith("lokr") for kind in keys)}
    if rest := found.keys() - low.keys() ^ high.keys():
        names = sorted(shown(key) for at in rest for key in found[at].values())
        raise LensError(f"{path}: tensors that belong to no adapter, or to two: {', '.join(names)}")
    factors, rank, alpha = _factors(path, file, low, said, size)
    kroneckers = {}
    for (module, part), keys in high.items():
        if part is not None:
            raise LensError(f"{path}: {module}: a LoKr of q, k and v apart is not read")
        kroneckers[module] = _kronecker(path, file, module, keys, said, size[module])
    adapter = Adapter(factors, rank, alpha, kroneckers, said.base_model, said.trigger)
    lora.check(adapter, config, str(path))
    return adapter


def _file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise LensError(f"{path}: no such file or folder; accepted: an adapter (safetensors), or a run with one")
        return path
    for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
        if (path / name).is_file():
            return path / name
    files = sorted(place.name for place in path.iterdir() if place.suffix == ".safetensors")
    if len(files) == 1:
        return path / files[0]
    raise LensError(
        f"{path}: {', '.join(files) or 'no safetensors file'}; accepted: an adapter file, or a folder with one"
    )


class _Said:
    """What lies around the tensors: a PEFT config beside the file, or its header."""

    def __init__(self, path: Path, header: Mapping[str, str]):
        self._where, self._header = path, header
        config = path.parent / PEFT_CONFIG
        peft: Mapping[str, Any] = {}
        if path.name == PEFT_WEIGHTS and config.is_file():
            self._where, peft = config, folder.read_json(config)
        elif _DIFFUSERS_HEADER in header:
            peft = self._json(header[_DIFFUSERS_HEADER])
        if peft.get("use_dora") or peft.get("alpha_pattern"):
            name = "use_dora" if peft.get("use_dora") else "alpha_pattern"
            raise LensError(f"{self._where}: {name} is {peft[name]!r:.80}; such adapters are not read")
        self._root_scaled = peft.get("use_rslora") is True
        self._alpha = peft.get("lora_alpha", next((header[name] for name in _ALPHA if name in header), None))
        text = lambda names: next((header[name] for name in names if name in header), "")
        base = peft.get("base_model_name_or_path")
        self.base_model = text(_BASE) or (base if isinstance(base, str) else "")
        self.trigger = text(_TRIGGER)

    def _json(self, text: str) -> dict:
        try:
            values = json.loads(text)
            return {name.removeprefix("transformer."): value for name, value in values.items()}
        except (ValueError, AttributeError, RecursionError):
            raise LensError(f"{self._where}: {_DIFFUSERS_HEADER} of its header is no JSON object") from None

    def alpha(self, rank: int) -> float:
        """alpha of a module without one of its own."""
        if self._alpha is None:
            return float(rank)
        try:
            alpha = float(self._alpha)
        except (TypeError, ValueError):
            alpha = math.nan
        if not math.isfinite(alpha):
            raise LensError(f"{self._where}: alpha is {self._alpha!r:.80}; accepted: a number")
        # Rank-stabilised: times alpha / √rank.
        return alpha * math.sqrt(rank) if self._root_scaled else alpha


def _number(path: Path, file, key: str) -> float:
    if file[key].size != 1:
        raise LensError(f"{path}: {shown(key)} is {list(file[key].shape)}; accepted: one number")
    return float(file[key].reshape(()))


def _factors(path: Path, file, low: Mapping, said: _Said, size: Mapping) -> tuple[dict, int, float]:
    """(A and B by module, their rank, alpha); q, k and v that lie apart are joined."""
    parts: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray]]] = collections.defaultdict(dict)
    alphas, ranks = {}, collections.Counter()
    for (module, part), keys in low.items():
        if not {"A", "B"} <= keys.keys():
            raise LensError(f"{path}: {shown(next(iter(keys.values())))} is there without the other factor")
        a, b = file[keys["A"]], file[keys["B"]]
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
            raise LensError(
                f"{path}: {shown(keys['A'])} is {list(a.shape)} and {shown(keys['B'])} {list(b.shape)}; accepted: "
                "[rank, in] and [out, rank]"
            )
        parts[module][part] = a, b
        ranks[len(a)] += 1
        alphas[module, part] = _number(path, file, keys["alpha"]) if "alpha" in keys else said.alpha(len(a))
    if len(ranks) > 1:
        counted = ", ".join(f"{rank} in {count} modules" for rank, count in sorted(ranks.items()))
        raise LensError(f"{path}: mixed ranks ({counted}); accepted: one rank")
    rank = next(iter(ranks), 1)
    alpha = next(iter(alphas.values()), float(rank))
    if len(set(alphas.values())) > 1:
        # One of each module: they go into B, and what is left is 1.
        alpha = float(rank)
        for (module, part), own in alphas.items():
            a, b = parts[module][part]
            parts[module][part] = a, b.astype(np.float32) * np.float32(own / rank)
    return {module: _joined(path, module, found, size[module]) for module, found in parts.items()}, rank, alpha


def _joined(path: Path, module: str, parts: Mapping, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module: its own, or of the q, k and v that it is made of, side by side."""
    if None in parts:
        if len(parts) > 1:
            raise LensError(f"{path}: {module}: an adapter of q, k and v together, and one of a part")
        return parts[None]
    third = size[0] // 3
    for a, b in parts.values():
        if (len(b), a.shape[1]) != (third, size[1]):
            raise LensError(
                f"{path}: an adapter of another model: a part of {module} is {[len(b), a.shape[1]]}, this model has "
                f"{[third, size[1]]}"
            )
    first = next(iter(parts.values()))[0]
    dtype = np.result_type(*(x.dtype for pair in parts.values() for x in pair))
    if len(parts) == 3 and all(np.array_equal(a, first) for a, _ in parts.values()):
        return first, np.concatenate([parts[i][1] for i in range(3)])
    rank = len(first)
    a = np.concatenate([one for one, _ in parts.values()])
    b = np.zeros((size[0], len(a)), dtype)
    for column, (part, (_, one)) in enumerate(parts.items()):
        b[part * third : (part + 1) * third, column * rank : (column + 1) * rank] = one
    return a, b


def _kronecker(path: Path, file, module: str, keys: Mapping, said: _Said, size: tuple[int, int]) -> Kronecker:
    """w1 and w2, each whole or a product of two; alpha / rank counts where one is a product (LyCORIS)."""
    where, rank, shapes = f"{path}: the LoKr of {module}", None, []
    for name in ("lokr_w1", "lokr_w2"):
        whole, factors = keys.get(name), [keys.get(f"{name}_a"), keys.get(f"{name}_b")]
        if (whole is None) == (None in factors) or any(file[key].ndim != 2 for key in (whole, *factors) if key):
            raise LensError(f"{where} needs {name}, or {name}_a and {name}_b, as matrices")
        if whole is None:
            (outputs, rank), (inner, inputs) = (file[key].shape for key in factors)
            if inner != rank:
                raise LensError(f"{where}: {name}_a is {[outputs, rank]}, and {name}_b {[inner, inputs]}")
            shapes.append((outputs, inputs))
        else:
            shapes.append(file[whole].shape)
    # Before anything is multiplied: factors of a small file could be those of a matrix that fits no memory.
    made = shapes[0][0] * shapes[1][0], shapes[0][1] * shapes[1][1]
    if made != size:
        raise LensError(f"{where} is {list(made)}, this model has {list(size)}: an adapter of another model")

    def matrix(name: str) -> np.ndarray:
        if name in keys:
            return np.array(file[keys[name]], np.float32)
        return file[keys[f"{name}_a"]].astype(np.float32) @ file[keys[f"{name}_b"]].astype(np.float32)

    scale = 1.0
    if rank:
        scale = (_number(path, file, keys["alpha"]) if "alpha" in keys else said.alpha(rank)) / rank
    return Kronecker(matrix("lokr_w1"), matrix("lokr_w2"), scale)


def write(path: Path, adapter: Adapter, style: Style, dtype: np.dtype | None = None) -> None:
    """Write an adapter of low rank: a folder for PEFT, else one safetensors file; neither may be there.

    dtype: of A and B, by default what they have. The header has rank, alpha, base model and trigger text.
    """
    if style not in STYLES:
        raise LensError(f"style is {style!r}; accepted: {', '.join(STYLES)}")
    if style != "peft" and path.suffix != ".safetensors":
        raise LensError(f"{path}: an adapter in the style of {style} is one file; accepted: NAME.safetensors")
    if path.exists():
        raise LensError(f"{path}: there already; choose another name")
    tensors = _tensors(adapter, style, dtype)
    peft = _peft_config(adapter)
    header = {"rank": str(adapter.rank), "alpha": str(peft["lora_alpha"]), "software": "lens-jax"}
    about = {"base_model": adapter.base_model, "trigger_text": adapter.trigger}
    header |= {name: text for name, text in about.items() if text}
    if style == "peft":
        with writer.as_lens_error(path), new_directory(path, False, PEFT_CONFIG) as aside:
            writer.write_file(aside / PEFT_WEIGHTS, tensors, metadata=header)
            write_json(aside / PEFT_CONFIG, peft)
        return
    if style == "diffusers":
        of_transformer = {f"transformer.{name}": value for name, value in peft.items()}
        header[_DIFFUSERS_HEADER] = json.dumps(of_transformer, indent=2, sort_keys=True)
    if style == "kohya":
        numbers = {"ss_network_dim": header["rank"], "ss_network_alpha": header["alpha"]}
        header |= {"ss_network_module": "networks.lora", **numbers}
    with writer.as_lens_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_file(path, tensors, metadata=header)


def _tensors(adapter: Adapter, style: Style, dtype: np.dtype | None) -> Tensors:
    origin = {}
    for module in adapter.factors:
        for name, part in zip(written(style, module), (0, 1, None)):
            if name is not None:
                origin[name] = module, part
    alpha = np.array(adapter.alpha, np.float32)

    def read(name: str) -> np.ndarray:
        module, part = origin[name]
        array = alpha if part is None else np.asarray(adapter.factors[module][part])
        return array if part is None or dtype is None else array.astype(dtype)

    def spec(module: str, part: int | None) -> Spec:
        array = alpha if part is None else adapter.factors[module][part]
        return Spec(np.dtype(array.dtype if part is None or dtype is None else dtype), array.shape)

    return Tensors({name: spec(*at) for name, at in origin.items()}, read)


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """PEFT's LoraConfig of an adapter; what is left out has PEFT's defaults."""
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": alpha,
        "target_modules": sorted(adapter.factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "base_model_name_or_path": adapter.base_model or None,
        "inference_mode": True,
    }
