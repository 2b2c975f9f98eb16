"""The stage `select`: what is kept, and of everything else the step, the value and the reason.

It compares stored scores with thresholds and reads no image, so that a build with other thresholds takes seconds.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from lens_jax.data.buckets import Bucket, assign, parse_buckets
from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.steps import ORDERS, Tables, first_drop
from lens_jax.data.engine.tables import DECISION

# What passes the nine steps and is not kept all the same.
NO_BUCKET, REMOVED = "too small for its bucket", "taken down"


class Select:
    """The stage: one decision an image."""

    name, version, reads = "select", 2, ("probe", "measure", "score", "keep")
    by_item = False

    def __init__(self, removed: frozenset[bytes] = frozenset()):
        """`removed` are ids that were taken down."""
        self._removed = removed

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        return {
            "removed": hashlib.sha256(b"".join(sorted(self._removed))).hexdigest(),
            "thresholds": {source.name: repr(config.thresholds_of(source)) for source in config.sources},
            "models": repr(config.models),
            "buckets": config.buckets,
            "max_upscale": config.max_upscale,
            "validation": config.validation,
            "seed": config.seed,
            "order": config.order,
        }

    def open(self, config: EngineConfig) -> Callable[[UnitInput], pa.Table]:
        return lambda given: decide(config, given.source, given.tables, self._removed)


def decide(
    config: EngineConfig,
    source: Source,
    tables: Tables,
    removed: frozenset[bytes] = frozenset(),
) -> pa.Table:
    """The table DECISION of a unit, from its tables probe, measure, score and keep; `removed` are ids taken down."""
    thresholds = config.thresholds_of(source)
    number, value, reason = first_drop(tables, config, thresholds, ORDERS[config.order])
    probe = tables["probe"].select(["id", "sha256", "width", "height"]).to_pylist()
    to_bucket = _bucket_of(parse_buckets(config.buckets), config.max_upscale)
    rows = []
    for row, step, measured, why in zip(probe, number.tolist(), value.tolist(), reason):
        decision = {"id": row["id"], "kept": False, "step": step or None, "reason": why}
        decision["value"] = None if np.isnan(measured) else measured
        if not step and row["id"] in removed:
            decision["reason"] = REMOVED
        elif not step:
            bucket = to_bucket(row["height"], row["width"])
            if bucket is None:
                decision |= {"reason": NO_BUCKET, "value": row["height"] * row["width"]}
            else:
                split = split_of(row["sha256"], config.seed, config.validation)
                decision |= {"kept": True, "bucket": str(bucket), "split": split}
        rows.append(decision)
    return pa.Table.from_pylist(rows, DECISION)


def survivors(config: EngineConfig, source: Source, tables: Tables) -> np.ndarray:
    """bool [n]: what passes steps 1 to 8 and has a bucket, from the tables probe, measure and score.

    Near duplicates are looked for among these alone: an image that is dropped anyway must not displace a good one.
    """
    number, _, _ = first_drop(tables, config, config.thresholds_of(source), ORDERS["report"][:-1])
    to_bucket = _bucket_of(parse_buckets(config.buckets), config.max_upscale)
    sizes = zip(tables["probe"]["height"].to_pylist(), tables["probe"]["width"].to_pylist())
    return np.array([not step and to_bucket(*size) is not None for step, size in zip(number.tolist(), sizes)], bool)


def split_of(sha256: bytes, seed: int, validation: float) -> str:
    """By the hash of the file, so that copies of it are on the same side."""
    digest = hashlib.sha256(b"%d:" % seed + sha256).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < validation * 2**64 else "train"


def groups(sizes: Sequence[tuple[str, int]], group_bytes: int) -> list[int]:
    """The group of each unit, given as (source, bytes) in the order of the run: numbered from 0 in each source, and
    closed by the unit that brings it to `group_bytes`."""
    found, number, held, current = [], 0, 0, None
    for source, size in sizes:
        if source != current:
            current, number, held = source, 0, 0
        elif held >= group_bytes:
            number, held = number + 1, 0
        held += size
        found.append(number)
    return found


def _bucket_of(buckets: Sequence[Bucket], max_upscale: float) -> Callable[[int, int], Bucket | None]:
    return functools.lru_cache(4096)(lambda height, width: assign(height, width, buckets, max_upscale))
