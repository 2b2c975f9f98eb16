"""The stage `embed`: a vector of unit length for every image among which near duplicates are looked for (report,
section 2, step 9: CLIP ViT-L/14)."""

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from lens_jax.data.engine.config import EngineConfig
from lens_jax.data.engine.decode import Limits
from lens_jax.data.engine.score import prepared_images, score_images
from lens_jax.data.engine.stage import UnitInput
from lens_jax.data.engine.steps import ORDERS, first_drop
from lens_jax.data.engine.tables import EMBED, vector_column
from lens_jax.data.engine.threads import THREADS, cores


class Embed:
    """The stage. In the report's order all that decodes and is large enough is embedded, in the cheap one what the
    other steps leave; what is kept is the same."""

    name, version, reads = "embed", 1, ("probe", "measure", "score")

    def settings(self, config: EngineConfig) -> Mapping[str, object]:
        from lens_jax.data.engine.scorers import embedding

        names = ["area"] if config.order == "report" else [f for f in vars(config.thresholds) if f != "cosine"]
        seen = {repr([(name, getattr(config.thresholds_of(s), name)) for name in names]) for s in config.sources}
        network = embedding.fingerprint(config.models.embedding) if config.models.embedding else ""
        return {"network": network, "dtype": config.models.dtype, "order": config.order, "thresholds": sorted(seen)}

    def processes(self, config: EngineConfig) -> int | None:
        """As of the stage `score`."""
        from lens_jax.data.engine.scorers import embedding

        return 1 if embedding.on_device(config.models.embedding) else None

    def open(self, config: EngineConfig) -> Callable[[UnitInput], pa.Table]:
        from lens_jax.data.engine.scorers import embedding

        scorer = embedding.load(config.models.embedding, config.models.dtype)
        threads = cores() if self.processes(config) else THREADS
        limits = Limits(config.max_pixels, config.max_bytes, config.strict_jpeg)
        before = (1, 2) if config.order == "report" else ORDERS["cheap"][:-1]

        def run(given: UnitInput) -> pa.Table:
            asked = first_drop(given.tables, config, config.thresholds_of(given.source), before)[0] == 0
            vectors = Vectors(len(asked), scorer.width)
            if asked.any():
                images = prepared_images(given, asked, [scorer], limits, threads)
                score_images([scorer], images, config.models.batch, vectors)
            return vectors.table(given.tables["probe"]["id"])

        return run


class Vectors:
    """The table of embeddings while it is filled."""

    def __init__(self, rows: int, width: int):
        self._values = np.zeros((rows, width), np.float16)
        self._missing = np.ones(rows, bool)

    def put(self, rows: list[int], found: Mapping[str, np.ndarray]) -> None:
        """float32 [n, width] of these n rows, made of unit length. One that has no direction stays null."""
        vectors = found["embedding"]
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        there = np.isfinite(length[:, 0]) & (length[:, 0] > 0)
        rows = np.asarray(rows)[there]
        self._values[rows] = vectors[there] / length[there]
        self._missing[rows] = False

    def table(self, ids: pa.ChunkedArray) -> pa.Table:
        """All rows, with their ids."""
        return pa.table([ids, vector_column(self._values, ~self._missing)], schema=EMBED)
