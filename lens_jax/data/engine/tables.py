"""The tables that stages write, one parquet file a unit, and how they are written and read.

PROBE, MEASURE, SCORE, EMBED, KEEP and DECISION have a row for every item of the unit, whatever became of it,
in the order of its reader: row i of each is about the same image. What was not computed is null, never 0. CAPTION has a
row for every caption asked for.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lens_jax.atomic import writing
from lens_jax.errors import LensError

try:
    import pyarrow as pa
except ImportError as error:
    raise LensError(f"the data engine needs pyarrow ({error}): pip install 'lens-jax[data]'") from None

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ID = pa.binary(16)
# Captions or alt text by language. Made from a list of pairs, or a dict.
TEXTS = pa.map_(pa.string(), pa.list_(pa.string()))
# Not a list of fixed size, of which pyarrow before 26 reads no table with a null in it.
VECTOR = pa.list_(pa.float16())

PROBE = pa.schema(
    [
        pa.field("id", ID, nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        ("sha256", pa.binary(32)),  # of the file
        ("bytes", pa.int64()),
        ("format", pa.string()),  # as Pillow names it
        ("width", pa.int32()),  # in pixels, turned as EXIF says
        ("height", pa.int32()),
        ("frames", pa.int32()),
        ("alt_text", TEXTS),
        ("url", pa.string()),
        ("licence", pa.string()),  # the image's own; null leaves it to the source
        ("problem", pa.string()),  # null where its header is in order
        ("detail", pa.string()),
    ]
)
MEASURE = pa.schema(
    [
        pa.field("id", ID, nullable=False),
        ("laplacian", pa.float32()),
        ("entropy", pa.float32()),
        ("luminance", pa.float32()),
        ("problem", pa.string()),  # null where the image decodes; that of the probe where it found one
        ("detail", pa.string()),
    ]
)
SCORE = pa.schema(
    [
        pa.field("id", ID, nullable=False),
        ("nsfw", VECTOR),  # probabilities of neutral, low, medium, high
        ("aesthetic", pa.float32()),
        ("watermark", pa.float32()),
    ]
)


EMBED = pa.schema([pa.field("id", ID, nullable=False), ("embedding", VECTOR)])  # of unit length, all of one width
KEEP = pa.schema(
    [
        pa.field("id", ID, nullable=False),
        ("duplicate_of", ID),  # null where it is kept
        ("cosine", pa.float32()),
        ("component", pa.int32()),  # how many images its group of duplicates has
    ]
)
DECISION = pa.schema(
    [
        pa.field("id", ID, nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        ("step", pa.int8()),  # 1 to 9, null where it is kept or dropped by none of the nine
        ("reason", pa.string()),
        ("value", pa.float32()),  # that was compared with the threshold
        ("bucket", pa.string()),  # "HEIGHTxWIDTH"
        ("split", pa.string()),
    ]
)
CAPTION = pa.schema(
    [
        pa.field("id", ID, nullable=False),
        ("language", pa.string()),
        ("kind", pa.string()),  # dense or brief
        ("text", pa.string()),
        ("status", pa.string()),
        ("model", pa.string()),
        ("prompt_version", pa.string()),
        ("attempts", pa.int32()),
        ("finish_reason", pa.string()),
        ("tokens_in", pa.int64()),
        ("tokens_out", pa.int64()),
        ("usd", pa.float64()),
    ]
)


def image_id(source: str, key: str) -> bytes:
    """The id of an image, 16 bytes: the same however its source is cut into files or units."""
    name = f"{source}\0{key}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(name, digest_size=16).digest()


def vector_column(values: np.ndarray, there: np.ndarray) -> pa.ListArray:
    """A column of VECTOR: the rows of float16 [n, D]; null but where `there`, bool [n]."""
    ends = np.concatenate([[0], np.cumsum(there)]) * values.shape[1]
    return pa.ListArray.from_arrays(
        pa.array(ends, pa.int32()), pa.array(values[there].reshape(-1)), VECTOR, mask=pa.array(~there)
    )


def vectors_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """What `vector_column` made: (float16 [n, D], 0 where there is none, and where there is one, bool [n]).

    D is 0 where there is none at all.
    """
    column = column.combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    there = column.is_valid().to_numpy(zero_copy_only=False)
    given = column.drop_null().flatten().to_numpy(zero_copy_only=False)
    count = np.count_nonzero(there)
    values = np.zeros((len(there), len(given) // max(count, 1)), np.float16)
    values[there] = given.reshape(count, -1 if count else 0)
    return values, there


def write_table(path: str | os.PathLike, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
    """A table as a parquet file that is there whole or not at all; `metadata` is kept beside its schema.

    The same table and metadata give the same bytes. LensError where it cannot be written.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    table = table.replace_schema_metadata(dict(sorted((metadata or {}).items())))
    # In the folder it goes to, which makes the rename atomic. The name of the process keeps two that race apart.
    partial = path.with_name(f".{path.name}.partial-{os.uname().nodename}-{os.getpid()}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # One row group in one thread, and no statistics of vectors: the bytes follow from the values alone.
            pq.write_table(table, partial, compression="zstd", row_group_size=max(table.num_rows, 1))
            os.replace(partial, path)
    except OSError as error:
        raise LensError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_table(path: str | os.PathLike, columns: list[str] | None = None) -> pa.Table:
    """A table that `write_table` wrote, or some columns of it; LensError names a file that cannot be read."""
    import pyarrow.parquet as pq

    try:
        # Memory-mapped files and read-ahead threads cost more than they give at a few hundred kilobytes a file.
        return pq.read_table(path, columns=columns, use_threads=False, partitioning=None)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise LensError(f"{path}: not a table that can be read ({_first_line(error)})") from None


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """What `write_table` was given beside the table, without reading the table."""
    found = _open(path).schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in found.items()}


def _open(path: str | os.PathLike) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise LensError(f"{path}: not a table that can be read ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
