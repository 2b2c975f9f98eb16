"""The record format: exact round trips, and only LensError for damaged bytes."""

import contextlib
import io

import msgpack
import numpy as np
import pytest
from PIL import Image

from lens_jax.data.images import encode_image
from lens_jax.data.records import Record, decode, decode_image, encode
from lens_jax.data.shards import ShardReader, ShardWriter
from lens_jax.errors import LensError


def pixels(height=6, width=9, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def example(seed=0, **changes) -> Record:
    fields = {
        "image": encode_image(pixels(seed=seed), "png"),
        "captions": {"en": ("red apple", "an apple"), "ja": ("赤リンゴ",)},
        "height": 6,
        "width": 9,
        "source": "test",
        "licence": "CC0",
        "meta": {"boxes": [[1, 2, 3, 4]], "score": 0.5, "kind": "scene", "n": 3},
    }
    return Record(**{**fields, **changes})


def test_round_trip():
    record = example()
    again = decode(encode(record), "here")
    assert again == record
    np.testing.assert_array_equal(decode_image(again), pixels())


def test_transparency_becomes_white_and_orientation_is_applied():
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the top left corner comes to the top right
    clear.save(buffer, "PNG", exif=exif)
    pixels = decode_image(example(image=buffer.getvalue(), height=4, width=2))
    assert pixels.shape == (4, 2, 3)
    assert pixels[0, 1].tolist() == [255, 0, 0]
    assert (np.delete(pixels.reshape(-1, 3), 1, axis=0) == 255).all()


def test_sixteen_bit_grey_is_scaled():
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 9), 257 * 100, np.uint16)).save(buffer, "PNG")
    assert (decode_image(example(image=buffer.getvalue())) == 100).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"v": 2}, "version"),
        ({"image": "text"}, "'image'"),
        ({"image": b""}, "'image'"),
        ({"height": 6.0}, "'height'"),
        ({"height": True}, "'height'"),
        ({"width": -1}, "'width'"),
        ({"captions": {}}, "'captions'"),
        ({"captions": {"en": "red apple"}}, "captions['en']"),
        ({"captions": {"en": [" "]}}, "captions['en']"),
        ({"captions": {"en": [3]}}, "captions['en']"),
        ({"captions": {"": ["x"]}}, "language"),
        ({"licence": None}, "'licence'"),
        ({"meta": {"a": {"b": 1}}}, "'meta'"),
        ({"meta": {"a": [[[1]]]}}, "'meta'"),
    ],
)
def test_wrong_fields_are_named(changes, words):
    fields = msgpack.unpackb(encode(example()))
    with pytest.raises(LensError, match=r"^here: ") as caught:
        decode(msgpack.packb({**fields, **changes}), "here")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hostile_bytes_raise_only_lens_errors():
    data = encode(example())
    rng = np.random.default_rng(0)
    damaged = [data[:n] for n in range(len(data))] + [b"", b"\xc1", b"\x91" * 5000, b"\xdf\xff\xff\xff\xff"]
    for _ in range(1500):
        mutant = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            mutant[place] = rng.integers(256)
        damaged.append(bytes(mutant))
    messages = []
    for bad in damaged:
        try:
            decode_image(decode(bad, "here"), "here")
        except LensError as error:
            messages.append(str(error))
    assert len(messages) > len(data)  # every truncation, and many a mutation
    assert all(message.startswith("here: ") and "\n" not in message for message in messages)


def test_decompression_bomb_is_refused():
    buffer = io.BytesIO()
    Image.new("1", (20_000, 5_000)).save(buffer, "PNG")
    with pytest.raises(LensError, match="20000x5000"), pytest.warns(Image.DecompressionBombWarning):
        decode_image(example(image=buffer.getvalue(), height=5000, width=20_000))


@pytest.mark.parametrize("text", ["half a \ud800", "p\0i\0c\0"])
def test_text_that_no_encoder_takes_is_refused(text):
    with pytest.raises(LensError, match=r"test: captions.'en'. .*NUL or broken UTF-8"):
        encode(example(captions={"en": (text,)}))
    with pytest.raises(LensError, match="cannot be stored"):
        encode(example(source=text)) if "\0" not in text else encode(example(meta={"a": 1 << 80}))


def test_shard_round_trip_and_damage(tmp_path):
    path = tmp_path / "shard"
    with ShardWriter(path) as writer:
        for seed in range(20):
            writer.write(example(seed))
    with ShardReader(path, 20) as reader:
        assert [record.image for record in reader.read([7, 3, 7])] == [example(seed).image for seed in (7, 3, 7)]
        with pytest.raises(LensError, match="no record 20"):
            reader.read([20])
        assert reader.read([]) == []

    def read_all(data: bytes) -> None:
        bad = tmp_path / "bad"
        bad.write_bytes(data)
        with ShardReader(bad, 20) as reader:
            for record in reader.read(range(20)):
                decode_image(record)

    data = path.read_bytes()
    # array_record takes a file cut at 64 KiB for an empty one; only the expected number gives it away.
    for length in (0, 100, 65_535, 65_536, len(data) - 65_536, len(data) - 1):
        with pytest.raises(LensError, match=str(tmp_path / "bad")):
            read_all(data[:length])
    used = len(data.rstrip(b"\0"))
    for place in np.random.default_rng(0).integers(64, min(used, 5000), 40):
        flipped = bytearray(data)
        flipped[place] ^= 0xFF
        with contextlib.suppress(LensError):  # a flip in the padding does no harm
            read_all(bytes(flipped))
    with pytest.raises(LensError, match="no such shard"):
        ShardReader(tmp_path / "none")


def test_failed_writer_leaves_nothing(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "shard") as writer:
            writer.write(example())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
