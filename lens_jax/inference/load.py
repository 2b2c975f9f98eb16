"""A `LensPipeline` from a run or a release, on one device or sharded over a mesh."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from lens_jax import config as config_files
from lens_jax import parallel
from lens_jax.convert import load as weights
from lens_jax.convert import packed as packed_files
from lens_jax.convert import source
from lens_jax.convert.component import COMPONENTS
from lens_jax.encoders import gpt_oss, kinds
from lens_jax.encoders.flux import FluxCodecConfig
from lens_jax.encoders.gpt_oss import GptOssTextConfig
from lens_jax.encoders.tokenizer import find_tokenizer
from lens_jax.errors import LensError, LensWarning, nearest
from lens_jax.inference import packed
from lens_jax.inference.pipeline import LensPipeline
from lens_jax.models.denoiser import DenoiserConfig, abstract_params
from lens_jax.posttraining import adapters
from lens_jax.reasoner.rewrite import ONE_DEVICE

_NO_HEAD = (
    "its text encoder is not GPT-OSS and writes no text; the reasoner of a server can (--reasoner api, ApiReasoner)"
)


def from_pretrained(path: str | Path, **options) -> LensPipeline:
    """From whatever is at `path`; `options` are those of `from_release` or `from_run`.

    What is not there may be the name of a model that comes with the package ("small"), of which `variant` is the file
    where there are several. `reasoner` rewrites prompts before they are drawn: a `reasoner.rewrite.Reasoner`, or
    "local" for the GPT-OSS that is the text encoder.
    """
    reasoner = options.pop("reasoner", None)
    known = reasoner is None or (not isinstance(reasoner, type) and callable(getattr(reasoner, "rewrite", None)))
    if reasoner != "local" and not known:
        raise LensError(f'reasoner is {reasoner!r:.60}; accepted: "local", or a reasoner (ApiReasoner)')
    if reasoner != "local":
        pipe = _from_pretrained(path, **options)
        pipe.reasoner = reasoner
        return pipe
    from lens_jax.reasoner.local import LocalReasoner

    if options.get("mesh") is not None:
        raise LensError(ONE_DEVICE)
    pipe = _from_pretrained(path, **{**options, "head": True})
    pipe.reasoner = LocalReasoner(pipe.text_encoder, name=str(path))
    return pipe


def _from_pretrained(path: str | Path, **options) -> LensPipeline:
    local = None if "://" in str(path) else source.as_path(path, "a checkpoint")
    variant = options.pop("variant", None) if local and packed_files.is_shipped(local) else None
    if local and (file := packed_files.find(local, variant)):
        if options.pop("head", False):
            raise LensError(f"{path}: {_NO_HEAD}")
        return packed.read(file, **_accepted(path, "packed model", options, DenoiserConfig))
    if local:
        source.check_exists(local)
    if local and source.holds_weights(local):
        return from_release(local, **_accepted(path, "release", options, from_release))
    return from_run(path, **options)


def from_release(
    path: Path,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    date: str | None = None,
    original_truncation: bool = False,
    denoiser: str | Path | None = None,
    autoencoder: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    tiling: bool = True,
    head: bool = False,
) -> LensPipeline:
    """A pipeline from a release folder, its conversion, or weights.

    Args:
      mesh: what the parameters are sharded over; by default all of them are on one device.
      dtype: what everything is computed in, and what denoiser and autoencoder are kept in (but for the autoencoder's
        statistics); by default bfloat16 on accelerators and float32 on a CPU.
      variant: "lens", "turbo" or "base", for the default steps and guidance; by default what the folder says.
      date: what the conversation around a prompt claims to be (see `encoders.gpt_oss`).
      original_truncation: cut a long prompt as the original does, with what follows it (see `encoders.gpt_oss`).
      denoiser, autoencoder, text_encoder, tokenizer: paths, used instead of what `path` holds (`source.find`).
      tiling: decode more than 4.3 megapixels at a time in parts (`encoders.flux`).
      head: load the text encoder's vocabulary head too, which only writing text needs.

    The tokenizer of a release folder that is given for its text encoder goes along with it. Without a tokenizer a
    pipeline takes `prompt_embeds` only. Raises LensError for what does not fit or is not there.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    given = {"denoiser": denoiser, "autoencoder": autoencoder, "text_encoder": text_encoder, "tokenizer": tokenizer}
    found = source.find(path, given)
    missing = [component.ours for component in COMPONENTS if component.ours not in found.parts]
    if missing:
        options = ", ".join(f"--{name.replace('_', '-')} PATH" for name in missing)
        keywords = ", ".join(f"{name}=..." for name in missing)
        raise LensError(f"{path}: holds no {' and no '.join(missing)}; give {options} (in Python {keywords}) beside it")
    network, autoencoder_part, text_part = (found.parts[component.ours] for component in COMPONENTS)
    model = network.config(dtype=dtype, param_dtype=dtype)
    image_config = autoencoder_part.config(dtype=dtype, param_dtype=dtype)
    text = GptOssTextConfig(
        path=str(path),
        selected=tuple(network.values["selected_layer_index"]),
        original_truncation=original_truncation,
        model=text_part.config(dtype=dtype),
        **({} if date is None else {"date": date}),
    )
    if (model.text_width, model.text_layers) != (text.width, text.num_layers):
        raise LensError(
            f"{path}: the transformer reads {model.text_layers} layers of width {model.text_width}, the text encoder "
            f"gives {text.num_layers} of {text.width}"
        )
    _, defaults = source.variant_of(found, variant)
    return LensPipeline(
        model,
        FluxCodecConfig(path=str(path), model=image_config, tiling=tiling),
        gpt_oss.from_part(text, text_part, find_tokenizer(found), mesh, head),
        weights.params(network, model, parallel.DENOISER_RULES, mesh),
        weights.params(autoencoder_part, image_config, parallel.AUTOENCODER_RULES, mesh),
        # The release's own default, whatever the variant.
        default_size=(1024, 1024),
        batch_size=4,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        mesh=mesh,
    )


def text_encoder(
    path: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    date: str | None = None,
    head: bool = False,
) -> gpt_oss.GptOssEncoder:
    """The GPT-OSS of a release folder, its conversion, or weights alone, with its tokenizer; options as there."""
    place = source.as_path(path, "a checkpoint")
    if packed_files.is_shipped(place):
        raise LensError(f"{path}: {_NO_HEAD}")
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    found, part = weights.find_part(place, "text_encoder")
    model = part.config(dtype=dtype)
    said = {} if date is None else {"date": date}
    config = GptOssTextConfig(path=str(path), selected=(model.layers - 1,), model=model, **said)
    return gpt_oss.from_part(config, part, find_tokenizer(found, tokenizer or ""), head=head)


class RunParts(NamedTuple):
    """What sampling needs of a run's config."""

    model: DenoiserConfig
    codec: kinds.Images
    text: kinds.Text


def run_parts(values: Mapping[str, Any], where: str) -> RunParts:
    """The model, codec and text encoder of a run's config, a plain dict as it is stored with a checkpoint.

    Nothing else of it is read. Fields of these three that this version does not know are left out, with a warning that
    names them; those that are missing have their defaults.
    """
    ignored: list[str] = []
    read = lambda hint, name: config_files.read(hint, values.get(name, {}), where, name, ignored)
    parts = RunParts(read(DenoiserConfig, "model"), read(kinds.Images, "codec"), read(kinds.Text, "text"))
    if ignored:
        names = ", ".join(ignored)
        warnings.warn(f"{where}: ignored, since this version does not know it: {names}", LensWarning, stacklevel=2)
    return parts


def run_config(path: str | Path) -> RunParts:
    """`run_parts` of a run's newest checkpoint."""
    from lens_jax.run import store

    folder = store.find(path)
    return run_parts(store.read_metadata(folder)["config"], str(folder))


def from_run(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    denoiser: str | Path | None = None,
    autoencoder: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    date: str | None = None,
    tiling: bool | None = None,
    part: Literal["ema", "params"] = "ema",
    head: bool = False,
    **options,
) -> LensPipeline:
    """A pipeline from the moving average of a run, or of one of its checkpoints.

    Of a run that trained an adapter it is applied, beside the denoiser that it was trained beside.

    Args:
      mesh: what the parameters are sharded over; each process reads its parts alone.
      denoiser: of a run that trained an adapter, where that denoiser is now, in place of the run's init_from.
      autoencoder, text_encoder, tokenizer: where these are now, in place of the paths that the run was trained with.
      date: another day for the conversation around a prompt than that of training.
      tiling: decode more than 4.3 megapixels at a time in parts; by default as the run's config has it.
      part: what of it, the moving average or the parameters themselves.
      head: load the text encoder's vocabulary head too, which only writing text needs.
      options: fields of the model to replace, e.g. dtype.
    """
    from lens_jax.run import store

    if part not in ("ema", "params"):
        raise LensError(f"part is {part!r:.60}; accepted: ema, params")
    folder = store.find(path)
    metadata = store.read_metadata(folder)
    model, codec, text = run_parts(metadata["config"], str(folder))
    codec = _replaced(f"{path}: autoencoder", codec, path=autoencoder)
    codec = _replaced(f"{path}: tiling", codec, tiling=tiling)
    text = _replaced(f"{path}: text_encoder", text, path=text_encoder)
    text = _replaced(f"{path}: tokenizer", text, tokenizer=tokenizer)
    text = _replaced(f"{path}: date", text, date=date)
    model = dataclasses.replace(model, **_accepted(path, "run", options, DenoiserConfig, from_run))

    if head and not isinstance(text, GptOssTextConfig):
        raise LensError(f"{path}: {_NO_HEAD}")

    sizes = _sizes(metadata.get("sizes"), str(folder))
    fitted = codec.abstract_fitted()
    adapter = adapters.run_config(metadata["config"], str(folder)).rank > 0
    if denoiser is not None and not adapter:
        raise LensError(f"{path}: denoiser is no option of this run: it has trained its own")
    wanted = {} if adapter else {part: {"denoiser": abstract_denoiser(model, mesh)}}
    if fitted:
        wanted["frozen"] = {"codec": parallel.abstract_params(fitted, parallel.AUTOENCODER_RULES, mesh)}
    parts = store.load(folder, wanted, mesh, partial=True) if wanted else {}
    if adapter:
        params = base_of(metadata["config"], str(folder), denoiser, mesh)
    else:
        params = jax.tree.map(lambda x: x.astype(model.param_dtype), parts[part]["denoiser"])
    pipe = LensPipeline(
        model,
        codec,
        _loaded(path, "text_encoder", text, mesh, **({"head": True} if head else {})),
        params,
        parts["frozen"]["codec"] if fitted else _loaded(path, "autoencoder", codec, mesh).params,
        # The squarest size it was trained on.
        default_size=min(sizes, key=lambda size: max(size) / min(size)),
        trained_areas=(min(map(math.prod, sizes)), max(map(math.prod, sizes))),
        **_defaults(metadata.get("sampling"), str(folder)),
        mesh=mesh,
    )
    if adapter:
        pipe.add_adapter(adapters.read(path, model, part))
    return pipe


def base_of(values: Mapping[str, Any], where: str, elsewhere: str | Path | None = None, mesh: Mesh | None = None):
    """The denoiser's parameters that a run with this config, which trained an adapter, was trained beside.

    As it had them, in the dtype that it computes in, from its init_from or from `elsewhere`; of a distillation with
    the adapter of its teacher.
    """
    from lens_jax.posttraining import teacher
    from lens_jax.pretraining.config import TrainConfig

    parts, init_part = run_parts(values, where), values.get("init_part", "ema")
    config = TrainConfig(
        model=dataclasses.replace(parts.model, param_dtype="float32"),
        codec=parts.codec,
        lora=adapters.run_config(values, where),
        init_from=str(elsewhere or values.get("init_from") or ""),
        init_part=init_part if init_part in ("ema", "params") else "ema",
    )
    try:
        return teacher.load(config, str(values.get("teacher_lora") or ""), mesh)[0]
    except LensError as error:
        raise LensError(f"{where}: {error}; where that is elsewhere now, give denoiser") from None


def abstract_denoiser(model: DenoiserConfig, mesh: Mesh | None = None) -> dict:
    """Shapes and layouts of the denoiser in a checkpoint, which has it in float32 whatever it is drawn with."""
    kept = abstract_params(dataclasses.replace(model, param_dtype="float32"))
    return parallel.abstract_params(kept, parallel.DENOISER_RULES, mesh)


def _sizes(values: Any, where: str) -> list[tuple[int, int]]:
    """(height, width) of all that a run was trained on."""
    count = lambda side: type(side) is int and 0 < side < 1 << 20
    pair = lambda size: isinstance(size, list) and len(size) == 2 and all(map(count, size))
    if not isinstance(values, list) or not values or not all(map(pair, values)):
        raise LensError(f"{where}: sizes of its metadata are {values!s:.80}; they must be pairs of pixels")
    return [tuple(size) for size in values]


def _defaults(values: Any, where: str) -> dict[str, Any]:
    """The steps and the guidance that a run is drawn with, where it says so."""
    if values is None:
        return {}
    steps, scale = (
        values.get(n) if isinstance(values, dict) else None for n in ("num_inference_steps", "guidance_scale")
    )
    if type(steps) is not int or not 0 < steps < 1 << 20 or type(scale) not in (int, float) or not math.isfinite(scale):
        raise LensError(f"{where}: sampling of its metadata is {values!s:.80}; it must be steps and a guidance")
    return {"num_inference_steps": steps, "guidance_scale": float(scale)}


def _loaded(path, option: str, config, mesh: Mesh | None, **options):
    """What a codec or a text encoder loads; the paths in a run's config are those of the machine that trained it."""
    try:
        return config.load(mesh, **options)
    except LensError as error:
        raise LensError(f"{path}: {error}; where it is elsewhere now, give {option}") from None


def _replaced(what: str, config, **fields):
    """The config with the fields that are given; LensError where its kind has no such field."""
    given = {name: str(v) if isinstance(v, Path) else v for name, v in fields.items() if v is not None}
    known = {field.name for field in dataclasses.fields(config)}
    if given.keys() - known:
        raise LensError(f"{what} is no option of this run: its {type(config).__name__} has none")
    return dataclasses.replace(config, **given)


def _accepted(path, kind: str, options: dict, *takers) -> dict:
    """The options, if what is called with them, functions or dataclasses, knows them all."""
    import inspect

    named = [p.name for taker in takers for p in inspect.signature(taker).parameters.values()]
    known = [name for name in named if name not in ("path", "options")]
    for name in options:
        if name not in known:
            raise LensError(
                f"{path}: {name}{nearest(name, known)} is no option of a {kind}; accepted: {', '.join(known)}"
            )
    return options
