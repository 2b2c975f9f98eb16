"""One network of a release folder, its conversion, or weights: found, checked against a config, and laid out."""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lens_jax import parallel
from lens_jax.convert import source
from lens_jax.convert.place import place
from lens_jax.convert.source import Part, Source
from lens_jax.errors import LensError


def find_part(path: str | Path, component: str) -> tuple[Source, Part]:
    """(source, part) of one network of a release folder, its conversion, or weights; LensError where not there."""
    found = source.find(Path(path))
    if component not in found.parts:
        raise LensError(f"{path}: holds no {component.replace('_', ' ')}; give a release folder")
    return found, found.parts[component]


def find_sized(path: str | Path, component: str, config: Any, field: str) -> tuple[Source, Part]:
    """`find_part`, and LensError where the weights have other sizes than `config`, the field `field`.model of a run."""
    try:
        found, part = find_part(path, component)
    except LensError as error:
        raise LensError(f"{field}.path: {error}") from None
    stored = part.config(dtype=config.dtype, param_dtype=config.param_dtype)
    for item in dataclasses.fields(config):
        ours, theirs = getattr(config, item.name), getattr(stored, item.name)
        if ours != theirs:
            raise LensError(f"{field}.model.{item.name} is {ours!r}, but the weights in {part.path} have {theirs!r}")
    return found, part


def params(part: Part, config: Any, rules: dict, mesh: Mesh | None = None, **options) -> dict:
    """The parameters of a network, on a mesh laid out as its rules say; `options` are those of its template."""
    template = part.component.module.template(config, **options)
    places = None
    if mesh is not None:
        specs = {path: parallel.spec_of(rules, path, like.shape, mesh) for path, like in template.items()}
        places = parallel.shardings(mesh, specs)
    return place(part.leaves(config, **options), template, places)
