"""What readers give: an image of a source as it lies there, or what is wrong with one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from lens_jax.data.engine.config import Source
from lens_jax.data.images import MAX_ENCODED_BYTES
from lens_jax.data.records import text_fault
from lens_jax.data.sources import folder

# Of texts that say no language.
LANGUAGE = "en"
# What `columns` of a source may name besides: only where it is named, since img2dataset's is of the file as it was
# downloaded, before it was encoded again.
SHA256 = {"sha256": "the sha256 of each image as it is stored, which is then compared"}
MAX_URL = 4096
MAX_LICENCE = 1000


@dataclass(frozen=True)
class Item:
    """One image of a unit."""

    # Names it in its source, the same in every run.
    key: str
    # The file; that it is an image is for decoding to see.
    data: bytes
    # Captions or alt text by language.
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    url: str = ""
    # Empty where the source says none of this image.
    licence: str = ""
    # What else of the source is kept in the record's meta: texts, numbers, lists of them.
    meta: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Something of a source that cannot be used, in the place where an item would be."""

    key: str
    # One of a few fixed reasons, for counting.
    reason: str
    detail: str = ""


def make_item(
    source: Source,
    key: str,
    data: bytes,
    texts: Mapping[str, list[str]] | Problem,
    url: object = "",
    licence: object = "",
    sha256: object = None,
) -> Item | Problem:
    """An item, if all is well with it.

    Texts that cannot be used cost the image only where the source's captions are kept: where new ones are written, it
    goes on without. An address or a licence that is no text, or far too long for one, is left out. `sha256` is what the
    source says of the file, in hexadecimal digits, where it is asked for by its columns.
    """
    if not data:
        return Problem(key, "no image", "empty")
    if len(data) > MAX_ENCODED_BYTES:
        return Problem(key, "too large", f"over {MAX_ENCODED_BYTES} bytes")
    if "sha256" in source.columns and hashlib.sha256(data).hexdigest() != str(sha256).lower():
        return Problem(key, "checksum", f"the source says {sha256!r:.70}")
    found = texts if isinstance(texts, Problem) else check_texts(key, texts)
    if isinstance(found, Problem):
        if source.caption == "keep":
            return found
        found = {}
    return Item(key, data, found, _short(url, MAX_URL), _short(licence, MAX_LICENCE))


def check_texts(key: str, texts: Mapping[str, list[str]]) -> Mapping[str, tuple[str, ...]] | Problem:
    """Captions as records may hold them, or why they cannot."""
    if not any(texts.values()):
        return Problem(key, "no caption")
    checked = folder.check_captions(key, texts)
    return Problem(key, checked.reason, checked.detail) if isinstance(checked, folder.Problem) else checked


def texts_of(key: str, value: object, language: object = None) -> Mapping[str, list[str]] | Problem:
    """Captions by language in a value of a table: a text, a list of texts, or a map from languages to either."""
    if value is None:
        return {}
    given = value if isinstance(value, dict) else {language or LANGUAGE: value}
    texts = {}
    for name, lines in given.items():
        lines = [lines] if isinstance(lines, str) else [] if lines is None else lines
        if not isinstance(name, str) or not 0 < len(name) <= 32 or text_fault(name):
            return Problem(key, "bad caption", f"language {name!r:.40}")
        if not isinstance(lines, (list, tuple)) or not all(isinstance(line, str) for line in lines):
            return Problem(key, "bad caption", f"{type(lines).__name__} in place of a text or a list of texts")
        texts[name] = list(lines)
    return texts


def _short(value: object, most: int) -> str:
    return value if isinstance(value, str) and len(value) <= most and not text_fault(value) else ""
