"""The page to look through a scene benchmark: every image with its prompt, what was asked and what was seen.

One HTML file that needs nothing else: images are embedded. Failures come first.
"""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; padding: 0 1em; color: #222; }
h2 { margin: 2em 0 .5em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 12px; }
.card { border: 1px solid #ccc; border-left: 6px solid #149650; border-radius: 4px; padding: 8px; }
.card.wrong { border-left-color: #d71e28; }
.card img { height: 160px; image-rendering: pixelated; display: block; margin-bottom: 6px; }
.no { color: #d71e28; font-weight: 600; }
.yes { color: #149650; }
.seen { color: #666; }
table { border-collapse: collapse; }
td, th { padding: 2px 12px 2px 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
"""


def scene_page(judged: Sequence, scores: dict, of: str = "") -> str:
    """HTML of `scene_bench.Judged` images `of` a model, failures first, under a table of `scene_bench.scores`."""
    wrong = [one for one in judged if not one.right]
    right = [one for one in judged if one.right]
    rows = "".join(
        f"<tr><td>{html.escape(task)}</td><td>{row['right']}/{row['total']}</td><td>{100 * row['share']:.1f} %</td>"
        f"<td>{100 * row['interval'][0]:.1f}-{100 * row['interval'][1]:.1f}</td></tr>"
        for task, row in (*scores["task"].items(), ("all", scores["all"]))
    )
    sections = "".join(
        f'<h2>{title} ({len(those)})</h2><div class="grid">{"".join(map(_card, those))}</div>'
        for title, those in (("Not as asked", wrong), ("As asked", right))
    )
    return (
        '<!doctype html><html><head><meta charset="utf-8"><title>Scene benchmark</title>'
        f"<style>{_STYLE}</style></head><body><h1>Scene benchmark</h1><p>{html.escape(of)}</p>"
        "<table><tr><th>task</th><th>right</th>"
        f"<th>share</th><th>95 % interval</th></tr>{rows}</table>{sections}</body></html>\n"
    )


def _card(one) -> str:
    marks = " ".join(
        f'<span class="{"yes" if value else "no"}">{"&#10003;" if value else "&#10007;"} {name}</span>'
        for name, value in one.verdicts.items()
    )
    seen = [f"{found.concept or 'unknown'} {list(found.box)}" for found in one.seen.objects]
    seen += [f"“{word.text}”" for word in one.seen.words]
    return (
        f'<div class="card{"" if one.right else " wrong"}"><img src="{_data_uri(one.image)}" alt="">'
        f"<div><b>{html.escape(one.prompt.task)}</b> {html.escape(one.caption)}</div><div>{marks}</div>"
        f'<div class="seen">seen: {html.escape(", ".join(seen) or "nothing")}; '
        f"{html.escape(one.seen.background or 'no')} background</div></div>"
    )


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
