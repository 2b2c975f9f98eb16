"""One example: an encoded image with its captions, as a msgpack map.

    {"v": 1, "image": bytes, "captions": {language: [str, ...]}, "height": int, "width": int,
     "source": str, "licence": str, "meta": {str: str | int | float | list}}

`meta` may be absent. The map is self-contained, so shards can be concatenated, filtered or copied without a side file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgpack
import numpy as np

from lens_jax.data import images
from lens_jax.errors import LensError

VERSION = 1
MAX_RECORD_BYTES = images.MAX_ENCODED_BYTES + (4 << 20)
MAX_LANGUAGES = 256
MAX_CAPTIONS = 64  # of one language
MAX_TEXT = 20_000  # characters; the report's captions stay under 500 words
MAX_META = 64
MAX_SIDE = 65_535


@dataclass(frozen=True)
class Record:
    """One image and what it shows."""

    # PNG, JPEG or WebP bytes.
    image: bytes
    # Captions by language code ("en", "de", ...), each language with at least one.
    captions: Mapping[str, tuple[str, ...]]
    # Size in pixels, after EXIF orientation.
    height: int
    width: int
    # Where it came from, e.g. "openmoji" or a file's path inside its folder.
    source: str = ""
    # Licence of the image, e.g. "CC BY-SA 4.0 (OpenMoji)".
    licence: str = ""
    # Anything an evaluator wants: texts, numbers, or lists of them (nested once).
    meta: Mapping[str, object] = field(default_factory=dict)


def encode(record: Record) -> bytes:
    """Bytes of one entry. Raises LensError when `decode` would refuse them."""
    fields = {
        "v": VERSION,
        "image": record.image,
        "captions": {language: list(texts) for language, texts in record.captions.items()},
        "height": record.height,
        "width": record.width,
        "source": record.source,
        "licence": record.licence,
    }
    if record.meta:
        fields["meta"] = dict(record.meta)
    _check(fields, record.source or "record")
    try:
        return msgpack.packb(fields, use_bin_type=True)
    except (ValueError, OverflowError) as error:  # half a surrogate pair, or an integer beyond 64 bits
        raise LensError(f"{record.source!r:.80}: cannot be stored ({error})") from error


def decode(data: bytes, where: str) -> Record:
    """The record in `data`. Raises LensError naming `where` for anything that is not a version-1 record."""
    fields = unpack(data, where, MAX_RECORD_BYTES)
    _check(fields, where)
    return Record(
        image=fields["image"],
        captions={language: tuple(texts) for language, texts in fields["captions"].items()},
        height=fields["height"],
        width=fields["width"],
        source=fields["source"],
        licence=fields["licence"],
        meta=fields.get("meta", {}),
    )


def unpack(data: bytes, where: str, most: int) -> dict:
    """The msgpack map in `data`, of at most `most` bytes; LensError names `where`."""
    if len(data) > most:
        raise LensError(f"{where}: record of {len(data)} bytes; at most {most} are accepted")
    try:
        fields = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except MemoryError:
        raise
    except Exception as error:  # msgpack raises ValueError, UnicodeDecodeError, StackError, ... by the kind of damage
        raise LensError(f"{where}: not a msgpack map ({type(error).__name__})") from error
    if not isinstance(fields, dict):
        raise LensError(f"{where}: expected a msgpack map, got {type(fields).__name__}")
    return fields


def decode_image(record: Record, where: str = "") -> np.ndarray:
    """uint8 [H, W, 3] of the record's image; LensError when it does not decode or its size is not the record's."""
    where = where or record.source or "record"
    pixels = images.decode_image(record.image, where)
    if pixels.shape[:2] != (record.height, record.width):
        found, said = f"{pixels.shape[0]}x{pixels.shape[1]}", f"{record.height}x{record.width}"
        raise LensError(f"{where}: the image is {found}, the record says {said}")
    return pixels


def _check(fields: dict, where: str) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise LensError(f"{where}: {message}")

    need(fields.get("v") == VERSION, f"record version {fields.get('v')!r:.40}; this program reads version {VERSION}")
    image = fields.get("image")
    need(isinstance(image, bytes) and 0 < len(image) <= images.MAX_ENCODED_BYTES, "'image' must be non-empty bytes")
    for key in ("height", "width"):
        side = fields.get(key)
        need(type(side) is int and 0 < side <= MAX_SIDE, f"{key!r} must be an integer from 1 to {MAX_SIDE}")
    for key in ("source", "licence"):
        need(_is_text(fields.get(key)), f"{key!r} must be a text of at most {MAX_TEXT} characters")
    captions = fields.get("captions")
    need(isinstance(captions, dict) and 0 < len(captions) <= MAX_LANGUAGES, "'captions' must map languages to lists")
    for language, texts in captions.items():
        name = f"captions[{language!r:.40}]"
        need(isinstance(language, str) and 0 < len(language) <= 32, f"{name}: a language has 1 to 32 characters")
        need(isinstance(texts, list) and 0 < len(texts) <= MAX_CAPTIONS, f"{name} must list 1 to {MAX_CAPTIONS} texts")
        need(all(_is_text(text) and text.strip() for text in texts), f"{name} must hold non-empty texts")
        need(not any(map(text_fault, texts)), f"{name} must hold texts without NUL or broken UTF-8")
    meta = fields.get("meta", {})
    need(isinstance(meta, dict) and len(meta) <= MAX_META, f"'meta' must be a map of at most {MAX_META} entries")
    for key, value in meta.items():
        need(isinstance(key, str) and _is_meta(value, depth=2), "'meta' must hold texts, numbers or lists of them")


def text_fault(text: str) -> str:
    """Why no text encoder takes the text; empty where nothing is wrong with it."""
    if "\0" in text:
        return "holds NUL; is it UTF-16 without a mark?"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no file or record can hold
        return "holds what is not UTF-8"
    return ""


def _is_text(value) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _is_meta(value, depth: int) -> bool:
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= 1024 and all(_is_meta(item, depth - 1) for item in value)
    return _is_text(value) or (isinstance(value, (int, float)) and not isinstance(value, bool))
