"""What became of the images of a table, counted by reason."""

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa

# Where nothing is wrong.
OK = "ok"
# Columns that say what is wrong, and the values that say that nothing is.
_REASONS = (("problem", ()), ("reason", ()), ("status", ("ok", "done")))


def outcomes(table: pa.Table) -> dict[str, int]:
    """Rows of any stage's table by what is wrong with them; OK is always there."""
    counts: Counter[str] = Counter({OK: 0})
    for column, fine in _REASONS:
        if column in table.column_names:
            for pair in table[column].value_counts().to_pylist():
                reason = pair["values"]
                counts[OK if reason is None or reason in fine else reason] += pair["counts"]
            return dict(counts)
    return {OK: table.num_rows}


def lost(counts: Mapping[str, int]) -> int:
    """How many images are not OK."""
    return sum(counts.values()) - counts.get(OK, 0)


def describe(counts: Mapping[str, int], most: int = 4) -> str:
    """The reasons, the most frequent first: "600 truncated, 12 bomb"."""
    reasons = sorted(((count, name) for name, count in counts.items() if name != OK and count), reverse=True)
    text = ", ".join(f"{count:,} {name}" for count, name in reasons[:most])
    return text + (f", {len(reasons) - most} other reasons" if len(reasons) > most else "")
