"""A prompt with all that rewards need to know of it, and files of them: JSON lines, one prompt a line.

    {"id": "text/poster/0007", "category": "Text", "subcategory": "Poster", "item": "concert poster",
     "dimensions": ["Attribute", "Color"], "prompt": "A concert poster ...", "texts": ["OPEN AIR"],
     "rubrics": [["OCR Alignment (title)", "The poster shows the words OPEN AIR."], ...], "scene": null}

Rubrics are stored as the report stores them: pairs of a name and a check (report section 4).
"""

import dataclasses
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lens_jax.atomic import writing
from lens_jax.errors import LensError, nearest

# Of one line. A prompt with eleven rubrics has about 3 KB; what is a hundred times as long is something else.
_LONGEST = 1 << 20


@dataclasses.dataclass(frozen=True)
class Rubric:
    """Something that an image of a prompt either meets or not."""

    # "Attribute Accuracy (shirt)": a family, and in brackets what of the prompt it is about.
    name: str
    # What to look for, in a sentence.
    check: str

    @property
    def family(self) -> str:
        """The name without its qualifier; means are logged by family."""
        return self.name.partition("(")[0].strip() or self.name


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is drawn, and what is asked of the image."""

    # Unique within a set, without blanks.
    id: str
    # What the model is given.
    prompt: str
    category: str = ""
    subcategory: str = ""
    item: str = ""
    # What the prompt was asked to pin down: "Attribute", "Count" and so on.
    dimensions: tuple[str, ...] = ()
    rubrics: tuple[Rubric, ...] = ()
    # What must be readable in the image, character for character.
    texts: tuple[str, ...] = ()
    # What the image must show, for prompts of a world that can be checked exactly: plain JSON that its checker reads.
    scene: Mapping[str, Any] | None = None


_FIELDS = tuple(field.name for field in dataclasses.fields(Prompt))


def to_json(prompt: Prompt) -> dict[str, Any]:
    """The prompt as the plain values of its line."""
    rubrics = [[rubric.name, rubric.check] for rubric in prompt.rubrics]
    values = {name: getattr(prompt, name) for name in _FIELDS}
    return {**values, "dimensions": list(prompt.dimensions), "rubrics": rubrics, "texts": list(prompt.texts)}


def from_json(values: Any, where: str) -> Prompt:
    """The prompt of the values of a line. LensError that starts with `where` and names the field and what it may be."""
    if not isinstance(values, dict):
        raise LensError(f"{where}: expected an object, got {_short(values)}")
    for name in values:
        if name not in _FIELDS:
            raise LensError(f"{where}: unknown field {name!r:.40}{nearest(name, _FIELDS)}")
    for name in ("id", "prompt"):
        if name not in values:
            raise LensError(f"{where}: no {name!r}; it needs at least id and prompt")
    text = {
        name: _text(values.get(name, ""), f"{where}: {name}")
        for name in ("id", "prompt", "category", "subcategory", "item")
    }
    if not text["id"] or len(text["id"]) > 200 or any(c.isspace() for c in text["id"]):
        raise LensError(f"{where}: id is {_short(text['id'])}; expected 1 to 200 characters without blanks")
    if not text["prompt"].strip():
        raise LensError(f"{where}: prompt is empty")
    scene = values.get("scene")
    if scene is not None and not isinstance(scene, dict):
        raise LensError(f"{where}: scene is {_short(scene)}; expected an object or null")
    return Prompt(
        **text,
        dimensions=_texts(values.get("dimensions", []), f"{where}: dimensions"),
        rubrics=rubrics_from_json(values.get("rubrics", []), f"{where}: rubrics"),
        texts=_texts(values.get("texts", []), f"{where}: texts"),
        scene=scene,
    )


def rubrics_from_json(values: Any, where: str) -> tuple[Rubric, ...]:
    """Rubrics from pairs of name and check; LensError for anything else, for empty ones and for a name twice."""
    if not isinstance(values, list):
        raise LensError(f"{where}: expected a list of [name, check] pairs, got {_short(values)}")
    rubrics = []
    for i, pair in enumerate(values):
        if not isinstance(pair, list) or len(pair) != 2:
            raise LensError(f"{where}[{i}]: expected a pair [name, check], got {_short(pair)}")
        name, check = (_text(part, f"{where}[{i}]").strip() for part in pair)
        if not name or not check:
            raise LensError(f"{where}[{i}]: name and check must not be empty")
        if any(name == other.name for other in rubrics):
            raise LensError(f"{where}[{i}]: the name {name!r:.60} is there twice")
        rubrics.append(Rubric(name, check))
    return tuple(rubrics)


def prompts_file(path: str | os.PathLike) -> Path:
    """The file of a prompt set, which is given as a file or as its folder."""
    return Path(path) / "prompts.jsonl" if Path(path).is_dir() else Path(path)


def iterate_lines(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """("PATH:LINE", value) of every line of a JSON lines file that is not blank. LensError for what is not JSON."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(_LONGEST + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > _LONGEST:
                    raise LensError(f"{where}: longer than {_LONGEST:,} bytes; expected a JSON object a line")
                if line.strip():
                    yield where, parse_line(line, where)
    except FileNotFoundError:
        raise LensError(f"{path}: no such file") from None
    except OSError as error:
        raise LensError(f"{path}: cannot be read: {error.strerror}") from None


def parse_line(line: bytes, where: str) -> Any:
    """The value of one line, which must be UTF-8 and strict JSON."""

    def constant(name: str):
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(line.decode("utf-8").removeprefix("\ufeff"), parse_constant=constant)
    except UnicodeDecodeError:
        raise LensError(f"{where}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise LensError(f"{where}: not JSON ({reason})") from None


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
    """The prompts of a file, or of `prompts.jsonl` in a folder, in their order.

    LensError names the first line that is wrong. A set without prompts is wrong.
    """
    path = prompts_file(path)
    if not path.exists():
        raise LensError(f"{path}: no such file; lens-jax prompts make, or scenes, writes one")
    prompts, seen = [], {}
    for where, values in iterate_lines(path):
        prompt = from_json(values, where)
        if prompt.id in seen:
            raise LensError(f"{where}: id {prompt.id!r:.80} is there already, in {seen[prompt.id]}")
        seen[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise LensError(f"{path}: no prompts in it; expected a JSON object a line with at least id and prompt")
    return prompts


def write_prompts(path: str | os.PathLike, prompts: Iterable[Prompt]) -> None:
    """A file of prompts, written aside and renamed: the same prompts give the same bytes."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path), open(partial, "w", encoding="utf-8", newline="\n") as file:
            for prompt in prompts:
                file.write(json.dumps(to_json(prompt), ensure_ascii=False, allow_nan=False) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise LensError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _texts(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise LensError(f"{where}: expected a list of texts, got {_short(values)}")
    texts = tuple(_text(value, f"{where}[{i}]") for i, value in enumerate(values))
    if not all(text.strip() for text in texts):
        raise LensError(f"{where}: an empty text in it")
    return texts


def _text(value: Any, where: str) -> str:
    """Text that can be printed and tokenised: no lone surrogates, no control characters but line breaks and tabs."""
    if not isinstance(value, str):
        raise LensError(f"{where}: expected text, got {_short(value)}")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\r\t" for c in value):
        raise LensError(f"{where}: control characters or half a surrogate pair in {value!r:.60}")
    return value


def _short(value: Any) -> str:
    return f"{value!r:.60}"
