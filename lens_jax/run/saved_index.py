"""Whether a checkpoint's index names all that was saved, and whether the bytes that it points to are on disk.

The arrays of a part are in one key-value store (OCDBT): a file `manifest.ocdbt` leads to nodes, and these to places in
data files. Here the nodes are read, a few hundred bytes a chunk, and of the data files only their lengths.
"""

import json
import math
from typing import Any

import jax
from etils import epath

from lens_jax.run.integrity import leaves_by_path


def problem(folder: epath.Path, parts: dict[str, Any]) -> str | None:
    """What is wrong with what was saved of `parts`, trees of arrays or of descriptions by name; None when nothing."""
    for part, tree in parts.items():
        wanted = {path.replace("/", "."): leaf for path, leaf in leaves_by_path(tree)}
        try:
            found = _problem(folder / part, wanted)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found = f"its index cannot be read ({' '.join(str(error).split())[:200]})"
        if found is not None:
            return f"{part}: {found}"
    return None


def _problem(folder: epath.Path, wanted: dict[str, Any]) -> str | None:
    import tensorstore as ts

    place = str(folder) + "/"
    base = ts.KvStore.open(place if "://" in place else {"driver": "file", "path": place}).result()
    store = ts.KvStore.open({"driver": "ocdbt", "base": base.spec().to_json()}).result()
    chunks: dict[str, int] = {}
    for key in store.list().result():
        name, _, rest = key.decode().partition("/")
        chunks[name] = chunks.get(name, 0) + (rest != "zarr.json")
    for name, leaf in wanted.items():
        if name not in chunks:
            return f"{name} is not in its index"
        saved = json.loads(store.read(f"{name}/zarr.json").result().value)
        shape, chunk = saved["shape"], saved["chunk_grid"]["configuration"]["chunk_shape"]
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if not key and (shape != list(leaf.shape) or saved["data_type"] != str(leaf.dtype)):
            return f"{name} is {saved['data_type']} {shape} in its index, and was {leaf.dtype} {list(leaf.shape)}"
        count = math.prod(-(-size // step) for size, step in zip(shape, chunk))
        if chunks[name] != count:
            return f"{chunks[name]} of the {count} chunks of {name} are in its index"
    for file, end in _ends(ts, base).items():
        if (length := (folder / file).stat().length) < end:
            return f"{file} has {length} bytes, its index tells of {end}"
    return None


def _ends(ts, base) -> dict[str, int]:
    """Data file -> the bytes it must have, of all that the newest version of an index points to."""
    ends: dict[str, int] = {}
    nodes = [ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]]
    while nodes:
        node = nodes.pop()
        _reach(ends, node)
        for entry in ts.ocdbt.dump(base, node).result()["entries"]:
            if "indirect_value" in entry:
                _reach(ends, entry["indirect_value"])
            elif "location" in entry:
                nodes.append(entry["location"])
    return ends


def _reach(ends: dict[str, int], location: str) -> None:
    """A location is `value:ocdbt.process_0/:d/HASH:OFFSET:LENGTH`."""
    _, base, name, offset, length = location.split(":")
    file = base + name
    ends[file] = max(ends.get(file, 0), int(offset) + int(length))
