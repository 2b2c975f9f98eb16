"""Histograms as SVG."""

import html
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT, FOOT = 640, 120, 22


def number(value: float) -> str:
    """A score as it is read: of pixels all digits, of a probability four."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def histogram(
    edges: np.ndarray, bars: np.ndarray, bounds: Sequence[float] = (), logarithmic: bool = False, title: str = ""
) -> str:
    """Bars between `edges`, of equal width where these are spaced so, with a line at each of `bounds`."""
    if logarithmic:
        place = lambda value: np.log(np.clip(value, edges[0], edges[-1]) / edges[0]) / np.log(edges[-1] / edges[0])
    else:
        place = lambda value: (np.clip(value, edges[0], edges[-1]) - edges[0]) / (edges[-1] - edges[0])
    most = max(int(bars.max(initial=0)), 1)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" role="img" aria-label="{html.escape(title, quote=True)}">',
        f'<line x1="0" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}" class="axis"/>',
    ]
    for low, high, count in zip(edges[:-1], edges[1:], bars):
        if count:
            left, right = place(low) * WIDTH, place(high) * WIDTH
            # A bar of one image among a million is still seen.
            tall = max(count / most * HEIGHT, 1)
            parts.append(
                f'<rect x="{left:.1f}" y="{HEIGHT - tall:.1f}" width="{max(right - left - 0.5, 0.5):.1f}" '
                f'height="{tall:.1f}"><title>{number(low)} to {number(high)}: {count:,}</title></rect>'
            )
    for bound in bounds:
        x = place(bound) * WIDTH
        parts.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{HEIGHT}" class="bound"/>')
        anchor = "end" if x > WIDTH - 60 else "start"
        parts.append(
            f'<text x="{x + (-3 if anchor == "end" else 3):.1f}" y="10" text-anchor="{anchor}">{number(bound)}</text>'
        )
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        value = edges[0] * (edges[-1] / edges[0]) ** share if logarithmic else edges[0] + share * (edges[-1] - edges[0])
        parts.append(f'<text x="{share * WIDTH:.0f}" y="{HEIGHT + 15}" text-anchor="{anchor}">{number(value)}</text>')
    return "".join(parts) + "</svg>"
