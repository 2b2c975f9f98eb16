"""What is known so far: JSON lines that are valid at every moment, and a table that a person reads."""

import json
import math
import os
from pathlib import Path
from typing import Any

from lens_jax.errors import LensError

# What the table shows of a result, in this order: name in the result, heading, factor, format.
COLUMNS = (
    ("seconds", "ms", 1e3, ".2f"),
    ("mfu", "MFU", 1e2, ".1f %"),
    ("hfu", "HFU", 1e2, ".1f %"),
    ("tflops_per_second", "TFLOP/s", 1, ".0f"),
    ("images_per_second", "images/s", 1, ".2f"),
    ("tokens_per_second", "tokens/s", 1, ".0f"),
    ("new_tokens_per_second", "new tokens/s", 1, ".1f"),
    ("compile_seconds", "compile s", 1, ".1f"),
    ("program_megabytes", "program GB", 1e-3, ".2f"),
    ("peak_device_megabytes", "peak GB", 1e-3, ".2f"),
)
# Not numbers of the table above, but worth their place behind them.
NOTES = (
    "layers", "equal", "forward_error", "query_error", "key_error", "value_error", "latents_error", "image_error",
    "golden", "text_seconds", "denoise_seconds", "decode_seconds", "first_image_seconds", "seconds_per_prompt",
    "first_token_seconds", "first_call_seconds",
    "gradient_seconds", "gigabytes_per_second", "files", "device", "memory_limit_megabytes", "peak_tflops_per_second",
)  # fmt: skip


class Results:
    """Appends records to `results.jsonl`, one write a line, on the disk before the next thing happens."""

    def __init__(self, path: Path):
        self.path, self.records = path, []
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise LensError(f"{path}: cannot be written: {error.strerror}") from None

    def add(self, record: dict[str, Any]) -> None:
        record = plain(record)
        data = (json.dumps(record, allow_nan=False) + "\n").encode()
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(28, "no space left")
            os.fsync(self._file)
        except OSError as error:
            # Half a line must not stay.
            os.ftruncate(self._file, before)
            raise LensError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.records.append(record)

    def close(self) -> None:
        os.close(self._file)


def plain(value: Any) -> Any:
    """As JSON has it: six digits, and null for what is not finite."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def cells(record: dict) -> list[str]:
    """A row of the table: part, case, status, the columns, and notes."""
    result = record.get("result") or {}
    numbers = []
    for name, _, factor, form in COLUMNS:
        form, _, unit = form.partition(" ")
        value = result.get(name)
        numbers.append("" if value is None else f"{value * factor:{form}}" + (f" {unit}" if unit else ""))
    notes = [f"{name.replace('_', ' ')} {_shown(result[name])}" for name in NOTES if result.get(name) is not None]
    if record.get("error"):
        notes.append(record["error"][:160])
    return [record["part"], record["case"], record["status"], *numbers, "; ".join(notes)]


def line(record: dict) -> str:
    """A record in one line of text, for whoever watches."""
    names = ["", "", "", *(heading for _, heading, _, _ in COLUMNS), ""]
    parts = [f"{name} {cell}".strip() for name, cell in zip(names, cells(record)) if cell]
    return f"{record['part']}: {', '.join(parts[1:])}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_summary(path: Path, header: dict, records: list[dict]) -> None:
    """`summary.md`: the header, and a table that is also on the console. Columns that nobody fills are left out."""
    rows = [["part", "case", "status", *(heading for _, heading, _, _ in COLUMNS), "notes"], *map(cells, records)]
    kept = [i for i in range(len(rows[0])) if i < 3 or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    aligned = lambda row: [
        row[i].ljust(widths[i]) if i < 3 or i == len(row) - 1 else row[i].rjust(widths[i]) for i in kept
    ]
    rule = "|".join("-" * (widths[i] + 2) for i in kept)
    lines = [f"| {' | '.join(aligned([cell.replace('|', '/') for cell in row]))} |" for row in rows]
    table = "\n".join([lines[0], f"|{rule}|", *lines[1:]])
    print(table)
    slowest = "".join(
        f"\nSlowest kernels, {record['case']}:\n\n" + "".join(f"- {kernel}\n" for kernel in record["result"]["slowest"])
        for record in records
        if (record.get("result") or {}).get("slowest")
    )
    about = "".join(f"- {name.replace('_', ' ')}: {_listed(value)}\n" for name, value in header.items() if value)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(f"# lens-jax bench suite\n\n{about}\n{table}\n{slowest}", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise LensError(f"{path}: cannot be written: {error.strerror}") from None


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return str(value)
