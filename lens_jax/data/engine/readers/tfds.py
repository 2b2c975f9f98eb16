"""A data set that tensorflow-datasets prepared, without TensorFlow: its folder of one version, in ArrayRecord files."""

import bisect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from lens_jax.data.engine.config import Source
from lens_jax.data.engine.readers import files, rows
from lens_jax.data.engine.readers.item import Item, Problem, make_item, texts_of
from lens_jax.data.engine.unit import Unit
from lens_jax.errors import LensError

COLUMNS = {"image": "feature with the images", "text": "feature with the captions"}
_MAX_JSON = 16 << 20


def units(source: Source, unit_rows: int) -> list[Unit]:
    """Runs of the examples, split after split; LensError where there is no such data set."""
    files.check_columns(source, COLUMNS)
    builder = _builder(source)
    _features(source, builder.info.features)
    count = 0
    for name, split in sorted(builder.info.splits.items()):
        size = sum(path.stat().st_size for path in map(Path, split.filepaths) if path.is_file())
        if split.num_examples > size:
            raise LensError(
                f"source {source.name}: {source.path}: split {name} cannot have {split.num_examples} images"
            )
        count += split.num_examples
    return files.split(source, ".", count, unit_rows)


def read(source: Source, unit: Unit) -> Iterator[Item | Problem]:
    """The examples of a unit, images as they were encoded."""
    import tensorflow_datasets as tfds

    builder = _builder(source)
    image, text = _features(source, builder.info.features)
    skip = {image: tfds.decode.SkipDecoding()}
    splits, opened = sorted(builder.info.splits.items()), {}
    ends = list(itertools.accumulate(split.num_examples for _, split in splits))
    for place in files.span(unit, ends[-1]):
        name, split = splits[bisect.bisect_right(ends, place)]
        number = place - (ends[bisect.bisect_right(ends, place)] - split.num_examples)
        key = f"{name}/{number:08d}"
        if name not in opened:
            opened[name] = builder.as_data_source(name, decoders=skip)
        try:
            example = opened[name][number]
        except Exception as error:  # of array_record, of protobuf, or of the feature's decoder
            yield Problem(key, "corrupt data", f"{type(error).__name__}: {error}".splitlines()[0][:200])
            continue
        data = example[image]
        if not isinstance(data, bytes):
            yield Problem(key, "no image", f"feature {image} is {type(data).__name__}, not bytes")
            continue
        texts = _texts(key, example.get(text)) if text else {}
        url, *licences = (_text(example.get(name)) for name in ("url", "licence", "license"))
        yield make_item(source, key, data, texts, url, licences[0] or licences[1])


def _builder(source: Source):
    folder = Path(source.path)
    if not (folder / "dataset_info.json").is_file():
        raise LensError(
            f"source {source.name}: {folder}: no dataset_info.json; name the folder of one version, such as coco/1.0.0"
        )
    _check_classes(source, folder / "features.json")
    try:
        import importlib_resources  # noqa: F401  (imported by tensorflow-datasets, missing from its requirements)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise LensError(f'the package {error.name} is missing: pip install "lens-jax[tfds]"') from error
    try:
        builder = tfds.builder_from_directory(folder)
        kind = builder.info.file_format
    except Exception as error:  # by what is wrong with the files
        raise LensError(f"source {source.name}: {folder}: {str(error).partition(chr(10))[0]:.200}") from error
    if kind is not tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
        raise LensError(
            f"source {source.name}: {folder}: its files are {getattr(kind, 'value', kind)}; "
            "prepare it with file_format='array_record'"
        )
    return builder


def _check_classes(source: Source, path: Path) -> None:
    """LensError unless features.json names classes of tensorflow-datasets alone: it imports whatever stands there."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise LensError(f"source {source.name}: {path}: over {_MAX_JSON} bytes")
        found = [json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError) as error:
        raise LensError(f"source {source.name}: {path}: cannot be read as JSON ({type(error).__name__})") from error
    while found:
        value = found.pop()
        if isinstance(value, dict):
            name = value.get("pythonClassName", "tensorflow_datasets.")
            if not (isinstance(name, str) and name.startswith("tensorflow_datasets.")):
                raise LensError(
                    f"source {source.name}: {path}: names the class {name!r:.80}, not of tensorflow_datasets"
                )
            found += value.values()
        elif isinstance(value, list):
            found += value


def _features(source: Source, features) -> tuple[str, str]:
    """The features with the image and, where there are any, the captions."""
    import tensorflow_datasets as tfds

    names = list(features)
    where = f"source {source.name}: {source.path}"
    image = source.columns.get("image", "")
    found = [name for name in names if isinstance(features[name], tfds.features.Image) and image in ("", name)]
    if len(found) > 1 and "image" in found:
        found = ["image"]
    if len(found) != 1:
        raise LensError(
            f"{where}: {len(found)} features of images among {', '.join(names)}; say which by columns image"
        )
    try:
        return found[0], rows.find_column(names, source.columns.get("text", ""), rows.TEXTS, "text")
    except LensError as error:
        raise LensError(f"{where}: {error}") from None


def _texts(key: str, value: object):
    """Captions in a text, a sequence of texts, or pairs of language and text, as `data/tfds_builder.py` writes them."""
    if isinstance(value, dict) and set(value) == {"language", "text"}:
        found: dict[str, list[str]] = {}
        for language, line in zip(value["language"], value["text"]):
            found.setdefault(_text(language), []).append(_text(line))
        return texts_of(key, found)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return texts_of(key, [_text(line) for line in value] if isinstance(value, (list, tuple)) else _text(value) or None)


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""
