"""`lens-jax plot`: the curves of one run, or of several laid over each other, as one image."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tyro

from lens_jax.console import make_console
from lens_jax.errors import LensError

# 1600 x 1400 pixels: three panels side by side, in letters that are read without zooming.
_SIZE, _DPI = (16, 14), 100
# With several runs colours tell parts of a panel and lines tell runs, so at most this many can be told apart.
_LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1)))
# Sizes drawn one by one; more are drawn as groups of about the same area.
_MOST_BUCKETS = 8

# Steps and values, in the order of steps; NaN where a record has no number.
Series = tuple[np.ndarray, np.ndarray]
# Records by kind, one a step in the order of steps.
Log = dict[str, list[dict]]


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    """Draw what runs have logged: losses, norms, learning rate, speed, waiting and memory (needs the extra: plot)."""

    # Run folders, or their metrics.jsonl.
    runs: tyro.conf.Positional[tuple[str, ...]]
    # The PNG; empty is plot.png in the first run's folder.
    out: str = ""
    # Records averaged into a point of a bold line, rounded up to an odd number; 1 draws them as they are.
    smooth: int = 9

    def __post_init__(self):
        if not self.runs:
            raise LensError("give at least one run: lens-jax plot RUN [RUN ...]")
        if len(self.runs) > len(_LINES):
            raise LensError(f"{len(self.runs)} runs; at most {len(_LINES)} can be told apart in one image")
        if self.smooth < 1:
            raise LensError(f"--smooth is {self.smooth}; it must be at least 1")


def plot(config: PlotConfig) -> Path:
    """Draw the runs, say where, and return the path."""
    try:
        import matplotlib
    except ImportError:
        raise LensError('lens-jax plot needs one more package: pip install "lens-jax[plot]"') from None
    paths = [_metrics_file(run) for run in config.runs]
    logs = {name: read_log(path) for name, path in zip(short_names(paths), paths)}
    out = Path(config.out) if config.out else paths[0].with_name("plot.png")
    # Without a window, and in matplotlib's own style whatever the user's is: the layout is made for it.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.use("agg")
        figure = _draw(logs, config.smooth)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=_DPI, format="png")
        except OSError as error:
            raise LensError(f"{out}: cannot be written: {error.strerror}") from None
    make_console().print(f"curves of {', '.join(logs)} in {out}")
    return out


# ---- reading ---------------------------------------------------------------------------------------------------------


def _metrics_file(run: str) -> Path:
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise LensError(f"{run}: no metrics.jsonl there; give the folder of a run")
    return path


def short_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    folders = [path.resolve().parent.parts for path in dict.fromkeys(paths)]
    if len(folders) < len(paths):
        raise LensError("the same run is given twice")
    for count in range(1, max(map(len, folders)) + 1):
        names = ["/".join(parts[-count:]) for parts in folders]
        if len(set(names)) == len(names):
            break
    return [name if len(name) <= 60 else f"…{name[-59:]}" for name in names]


def read_log(path: Path) -> Log:
    """The records of a run. What is no record is passed over (a crash may cut a line short); of several records of
    one step, which a run killed and taken up again by hand may have, the last one counts."""
    found: dict[str, dict[int, dict]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            found.setdefault(str(record["kind"]), {})[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            continue
    if not found.get("train"):
        raise LensError(f"{path}: no training records in it; the first is written after logging.every steps")
    return {kind: [records[step] for step in sorted(records)] for kind, records in found.items()}


def series(records: Sequence[dict], *key: str | int) -> Series:
    """The number under a key, or a path of keys, in every record."""

    def value(found) -> float:
        for part in key:
            try:
                found = found[part]
            except (KeyError, IndexError, TypeError):
                return math.nan
        return float(found) if isinstance(found, int | float) else math.nan

    return np.array([record["step"] for record in records]), np.array([value(record) for record in records])


def smoothed(values: np.ndarray, count: int) -> np.ndarray:
    """Centred means over `count` values. NaN are left out, and filled from around them.

    Near the ends as many are taken on either side as there are on the shorter one: a fall or rise is not flattened.
    """
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0], np.cumsum(x)]) for x in (np.where(known, values, 0), known))
    places = np.arange(len(values))
    reach = np.minimum(count // 2, np.minimum(places, places[::-1]))
    first, last = places - reach, places + reach + 1
    found = counts[last] - counts[first]
    return np.where(found > 0, (sums[last] - sums[first]) / np.maximum(found, 1), np.nan)


def bucket_groups(buckets: Sequence[str]) -> dict[str, list[str]]:
    """Label -> the sizes HEIGHTxWIDTH drawn as one line: each for itself, or those of about one area when many."""
    ordered = sorted(buckets, key=lambda bucket: (_side(bucket), bucket))
    if len(ordered) <= _MOST_BUCKETS:
        return {bucket.replace("x", " x "): [bucket] for bucket in ordered}
    groups: list[list[str]] = []
    for bucket in ordered:
        # The sides of one base size differ by 5 %, those of neighbouring base sizes by 33 % and more.
        if groups and _side(bucket) < 1.1 * _side(groups[-1][0]):
            groups[-1].append(bucket)
        else:
            groups.append([bucket])
    return {f"about {np.mean([_side(b) for b in group]):.0f}² ({len(group)} sizes)": group for group in groups}


def _side(bucket: str) -> float:
    """Of a square of the same area."""
    return math.sqrt(math.prod(int(side) for side in bucket.split("x")))


def _is_size(name: str) -> bool:
    return re.fullmatch(r"\d+x\d+", name) is not None


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _draw(logs: dict[str, Log], smooth: int):
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(3, 3, sharex=True)
    for draw, axis in zip(_PANELS, axes.flat):
        draw(axis, logs, smooth)
        _finish(axis)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0, 0].set_xlim(left=0)
    axes[0, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(logs) > 1:
        handles = [
            Line2D([], [], color=f"C{i}", linestyle=_LINES[i], linewidth=2, label=run) for i, run in enumerate(logs)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(logs)), fontsize=11, frameon=False)
    else:
        figure.suptitle(next(iter(logs)), fontsize=13)
    return figure


def _finish(axis) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9, labelbottom=True)
    if not axis.lines:
        axis.text(0.5, 0.5, "nothing logged", transform=axis.transAxes, ha="center", va="center", color="0.5")
        axis.set_yticks([])
    elif axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8.5, framealpha=0.8, edgecolor="none", loc="best")


def _curve(axis, data: Series, smooth: int, faint: bool = True, **style) -> None:
    """The records as they are, faintly, and their running mean."""
    steps, values = data
    known = np.isfinite(values)
    if not known.any():
        return
    if smooth == 1 or len(steps) <= 2:
        axis.plot(steps[known], values[known], linewidth=1.4, **style)
        return
    if faint:
        axis.plot(steps[known], values[known], linewidth=0.7, alpha=0.4, color=style["color"])
    axis.plot(steps, smoothed(values, smooth), linewidth=1.6, **style)


def _loss(axis, logs: dict[str, Log], smooth: int) -> None:
    axis.set_title("loss")
    for i, log in enumerate(logs.values()):
        label = {} if i else {"label": "training"}
        _curve(axis, series(log["train"], "loss"), smooth, color=f"C{i}", linestyle=_LINES[i], **label)
        steps, values = series(log.get("validation", []), "loss")
        label = {} if i else {"label": "validation"}
        if len(steps):
            size = 4 if len(steps) <= 50 else 2
            axis.plot(steps, values, "o-", color=f"C{i}", markersize=size, linewidth=0.8, markeredgecolor="black",
                      markeredgewidth=size / 8, **label)  # fmt: skip
    _cut_spikes(axis)


def _loss_by_noise_level(axis, logs: dict[str, Log], smooth: int) -> None:
    axis.set_title("loss by noise level t")
    count = max((len(r.get("loss_by_noise_level") or ()) for log in logs.values() for r in log["train"]), default=0)
    for level in range(count):
        data = [series(log["train"], "loss_by_noise_level", level) for log in logs.values()]
        _parts(axis, data, smooth, level / max(1, count - 1), f"{level / count:.1f} to {(level + 1) / count:.1f}")
    _cut_spikes(axis)


def _loss_by_bucket(axis, logs: dict[str, Log], smooth: int) -> None:
    axis.set_title("loss by size (height x width)")
    names = {name for log in logs.values() for r in log["train"] for name in r.get("loss_by_bucket") or ()}
    groups = bucket_groups([name for name in names if _is_size(name)])
    for i, (label, buckets) in enumerate(groups.items()):
        data = []
        for log in logs.values():
            each = [series(log["train"], "loss_by_bucket", bucket) for bucket in buckets]
            data.append((each[0][0], _mean([values for _, values in each])))
        _parts(axis, data, smooth, i / max(1, len(groups) - 1), label)
    _cut_spikes(axis)


def _cut_spikes(axis) -> None:
    """Let the highest hundredth of the points leave the panel, where they would squeeze the rest."""
    drawn = [np.asarray(line.get_ydata(), float) for line in axis.lines]
    if not drawn:
        return
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    top = 1.2 * np.quantile(values, 0.99)
    if values.max() > top:
        axis.set_ylim(values.min() - 0.05 * (top - values.min()), top)


def _parts(axis, data: list[Series], smooth: int, shade: float, label: str) -> None:
    """One part of a panel, a line a run."""
    from matplotlib import colormaps

    colour = colormaps["viridis"](0.9 * shade)
    for i, one in enumerate(data):
        _curve(axis, one, smooth, faint=False, color=colour, linestyle=_LINES[i], label=None if i else label)


def _mean(rows: list[np.ndarray]) -> np.ndarray:
    known = np.isfinite(rows)
    return np.where(known.any(axis=0), np.where(known, rows, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)


def _norms(axis, logs: dict[str, Log], smooth: int) -> None:
    axis.set_title("norms")
    axis.set_yscale("log")
    names = ("parameter", "gradient", "update")
    for part, name in enumerate(names):
        data = [series(log["train"], f"{name}_norm") for log in logs.values()]
        _parts(axis, data, smooth, part / (len(names) - 1), name)


def _learning_rate(axis, logs: dict[str, Log], smooth: int) -> None:
    axis.set_title("learning rate")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _single(axis, logs, 1, "learning_rate")


def _images(axis, logs: dict[str, Log], smooth: int) -> None:
    axis.set_title("images a second")
    _single(axis, logs, smooth, "images_per_second")
    axis.set_ylim(bottom=0)


def _utilisation(axis, logs: dict[str, Log], smooth: int) -> None:
    """MFU where all runs know it; else operations, so that runs on different devices stay comparable."""
    if all("mfu" in record for log in logs.values() for record in log["train"]):
        axis.set_title("MFU, % of the devices' peak")
        _single(axis, logs, smooth, "mfu", scale=100)
    else:
        axis.set_title("model TFLOP/s a device")
        _single(axis, logs, smooth, "tflops_per_second_per_device")
    axis.set_ylim(bottom=0)


def _shares(axis, logs: dict[str, Log], smooth: int) -> None:
    axis.set_title("% of time waiting for data, % of tokens padding")
    for part, (name, label) in enumerate({"data_wait_share": "waiting", "padding_share": "padding"}.items()):
        data = [series(log["train"], name) for log in logs.values()]
        _parts(axis, [(steps, 100 * values) for steps, values in data], smooth, 0.75 * part, label)
    axis.set_ylim(bottom=0)


def _memory(axis, logs: dict[str, Log], smooth: int) -> None:
    axis.set_title("memory, GB")
    names = {"device_memory_peak_gb": "fullest device, peak", "process_memory_gb": "process"}
    for part, (name, label) in enumerate(names.items()):
        _parts(axis, [series(log["train"], name) for log in logs.values()], 1, 0.75 * part, label)
    axis.set_ylim(bottom=0)


def _single(axis, logs: dict[str, Log], smooth: int, name: str, scale: float = 1) -> None:
    """A panel of one number, a line a run."""
    for i, log in enumerate(logs.values()):
        steps, values = series(log["train"], name)
        _curve(axis, (steps, scale * values), smooth, color=f"C{i}", linestyle=_LINES[i])


_PANELS: tuple[Callable, ...] = (
    _loss, _loss_by_noise_level, _loss_by_bucket,
    _norms, _learning_rate, _images,
    _utilisation, _shares, _memory,
)  # fmt: skip
