"""Configs are frozen dataclasses in python files: found by name, written as JSON, read back checked.

Nothing here knows what a config is for; `configs/` holds one python file a run.
"""

import contextlib
import dataclasses
import importlib
import math
import os
import pkgutil
import runpy
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lens_jax.errors import LensError, nearest

# The key under which an object in JSON says which dataclass it is.
KIND = "kind"


def available() -> list[str]:
    """Names of the configs that come with the package."""
    import lens_jax.configs

    return sorted(module.name for module in pkgutil.iter_modules(lens_jax.configs.__path__))


def load(name: str, *kinds: type) -> Any:
    """The `config`, one of `kinds`, of a python file given as a path, or by the name of a packaged one."""
    path = Path(name).expanduser()
    # A folder, or a file of another kind, of the name of a packaged config does not hide it.
    if path.suffix == ".py" or (path.is_file() and name not in available()):
        if not path.is_file():
            raise LensError(f"{name}: no such config file")
        try:
            with _importable(path.absolute().parent):
                config = runpy.run_path(str(path)).get("config")
        except SyntaxError as error:
            raise LensError(f"{name}:{error.lineno}: {error.msg}") from None
        except LensError as error:
            raise LensError(f"{name}: {error}") from None
        except Exception as error:  # a config is a program: whatever it raises is the user's to see
            raise LensError(f"{name}: {type(error).__name__}: {error}") from None
    elif name in available():
        config = importlib.import_module(f"lens_jax.configs.{name}").config
    else:
        raise LensError(
            f"no config {name!r}{nearest(name, available())}; accepted: {', '.join(available())}, or a .py file"
        )
    if not isinstance(config, kinds):
        wanted = " or a ".join(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
        raise LensError(f"{name}: it must define `config`, a {wanted}")
    return config


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """What lies beside a config can be imported by it, as by a script that python runs."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def check_numbers(config: Any, prefix: str = "") -> None:
    """LensError for a number of a config, or of one within it, that is not finite."""
    for name, value in values(config, prefix):
        if isinstance(value, float) and not math.isfinite(value):
            raise LensError(f"{name} is {value}; it must be a finite number")


def values(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within a config, with its dotted name."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from values(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from values(part, f"{name}[{i}]")
    else:
        yield name, value


def expand_home(value: Any, name: str = "") -> Any:
    """A config with `~/` at the start of its paths as the home folder: a shell leaves `--out=~/x` as it is.

    Prompts are no paths.
    """
    if dataclasses.is_dataclass(value):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {key: expand_home(part, key) for key, part in old.items()}
        changed = {key: part for key, part in new.items() if part is not old[key]}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple):
        new = tuple(expand_home(part, name) for part in value)
        return value if all(a is b for a, b in zip(new, value)) else new
    if isinstance(value, str) and "prompt" not in name and (value == "~" or value.startswith("~/")):
        return os.path.expanduser(value)
    return value


def to_dict(config) -> dict[str, Any]:
    """A config as plain JSON values. Every object says which dataclass it is of, in `kind`."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {KIND: type(config).__name__, **{name: _plain(value) for name, value in values.items()}}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return tuple(_plain(part) for part in value) if isinstance(value, tuple) else value


def from_dict(
    cls: type, values: Mapping[str, Any], where: str, prefix: str = "", ignored: list[str] | None = None
) -> Any:
    """A config back from JSON values, each checked against its type; LensError names the field.

    Fields that are missing have their defaults. Unknown ones are an error, or are left out and named in `ignored`.
    """
    if not isinstance(values, Mapping):
        raise LensError(f"{where}: {prefix or 'the config'} must be an object")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    values = dict(values)
    if (kind := values.pop(KIND, cls.__name__)) != cls.__name__:
        raise LensError(f"{where}: {prefix or 'the config'} is of kind {kind!r:.80}; expected {cls.__name__}")
    for name in [name for name in values if name not in fields]:
        if ignored is None:
            raise LensError(f"{where}: unknown field {prefix}{name}{nearest(name, fields)}")
        ignored.append(f"{prefix}{name}")
        del values[name]
    try:
        return cls(**{k: read(hints[k], v, where, f"{prefix}{k}", ignored) for k, v in values.items()})
    except LensError as error:
        raise error if str(error).startswith(where) else LensError(f"{where}: {error}") from None


def read(hint: Any, value: Any, where: str, name: str, ignored: list[str] | None = None) -> Any:
    """The value of the field `name` from JSON, of a type or a union of types; `ignored` as in `from_dict`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where, f"{name}.", ignored)
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(inner) == len(value):
            return tuple(read(h, v, where, f"{name}[{i}]", ignored) for i, (h, v) in enumerate(zip(inner, value)))
    elif origin is Literal and value in args:
        return value
    elif origin in (typing.Union, types.UnionType):
        kinds = {option.__name__: option for option in args if dataclasses.is_dataclass(option)}
        if kinds and isinstance(value, Mapping):
            kind = value.get(KIND)
            if kind not in kinds:
                raise LensError(f"{where}: {name}.{KIND} is {kind!r:.80}; accepted: {', '.join(kinds)}")
            return read(kinds[kind], value, where, name, ignored)
        for option in args:
            try:
                return read(option, value, where, name, ignored)
            except LensError:
                continue
    elif hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    elif hint is type(None) and value is None:
        return None
    raise LensError(f"{where}: {name} is {value!r:.80}; expected {getattr(hint, '__name__', hint)}")
