"""Images of text: the same from the same seed, legible, and as their captions say."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from lens_jax.data import records
from lens_jax.data.buckets import Bucket
from lens_jax.data.engine.config import EngineConfig, Source, Synthetic
from lens_jax.data.engine.synthetic.block import Look, Masks, draw_block
from lens_jax.data.engine.synthetic.colours import COLOURS, contrast, luminance
from lens_jax.data.engine.synthetic.draw import synthesize
from lens_jax.data.engine.synthetic.fonts import load_fonts
from lens_jax.data.engine.synthetic.materials import load_materials
from lens_jax.data.engine.synthetic.paint import lay_on, legibility
from lens_jax.data.engine.synthetic.written import place, quote
from lens_jax.errors import LensError, LensWarning

SOURCES = (Source("none", "folder", "."),)


def config_of(fonts, buckets=("256x256", "192x320"), **options) -> EngineConfig:
    given = {"count": 10, "size": 256, "fonts": tuple(fonts), **options}
    return EngineConfig(sources=SOURCES, buckets=buckets, synthetic=Synthetic(**given))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two images, one with a caption, and one file that is none."""
    folder = tmp_path_factory.mktemp("behind [1]")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    Image.new("RGB", (280, 260), "white").save(folder / "white.png")
    (folder / "white.txt").write_text("a sheet of white paper")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(100))
    return folder


@pytest.fixture(scope="module")
def materials(latin, amiri, devanagari, pictures, tmp_path_factory):
    texts = tmp_path_factory.mktemp("texts") / "lines.txt"
    texts.write_text('A line with several words in it\nمرحبا بكم\nनमस्ते दुनिया\n"quoted"\n', encoding="utf-8")
    config = config_of(
        [*latin, amiri, devanagari], texts=(str(texts),), backgrounds=(str(pictures),), locales=("en", "de", "hi")
    )
    return load_materials(config)


def test_the_same_number_gives_the_same_record_in_any_order(materials, latin, amiri, devanagari, pictures):
    made = [synthesize(3, index, materials) for index in range(8)]
    assert [synthesize(3, index, materials) for index in (5, 2)] == [made[5], made[2]]
    assert len({record.image for record in made}) == 8
    assert synthesize(4, 5, materials) != made[5]


def test_captions_and_boxes_say_what_is_there(materials):
    """Every text is quoted and where its box is; boxes lie in the image and apart."""
    seen, problems = set(), []
    for index in range(24):
        record = synthesize(0, index, materials)
        assert records.decode(records.encode(record), "here") == record
        shape, caption = Bucket(record.height, record.width), record.captions["en"][0]
        assert records.decode_image(record).shape == (record.height, record.width, 3)
        assert 1 <= len(record.meta["text"]) <= 4
        assert "\n" not in caption
        for text, box in zip(record.meta["text"], record.meta["boxes"]):
            assert quote(text) in caption
            assert place(box, shape) in caption.lower()
            assert 0 <= box[0] < box[2] <= record.width
            assert 0 <= box[1] < box[3] <= record.height
        for a, b in itertools.combinations(record.meta["boxes"], 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
        if record.meta["background"] == "white.png":
            assert "a sheet of white paper." in caption or "a detail of" in caption
        seen |= {record.meta["background"], *record.meta["text"]}
        problems += record.meta["problems"]
    assert {"solid", "gradient", "white.png", "noise.png", "مرحبا بكم", "नमस्ते दुनिया", '"quoted"'} <= seen
    assert problems
    assert all(problem.startswith("background: unreadable image (broken.jpg: ") for problem in problems)


@pytest.mark.parametrize("behind", ["noise", "stripes", "grey", "black"])
def test_what_is_written_stands_out(behind, latin):
    """The contrast floor holds on whatever is behind, by measurement of the pixels."""
    rng = np.random.default_rng(1)
    pixels = {
        "noise": rng.integers(0, 256, (120, 240, 3)),
        "stripes": np.tile(np.repeat([0, 255], 6), (3, 120, 20)).transpose(1, 2, 0),
        "grey": np.full((120, 240, 3), 118),
        "black": np.zeros((120, 240, 3)),
    }[behind].astype(np.uint8)
    font = load_fonts(latin[:1])[0][0]
    for options in ({}, {"blur": 1.5}, {"outline": 2}, {"panel": 4, "angle": 8.0}):
        masks = draw_block("Words", font, Look(size=40, width=200, **options), breakable=False)
        canvas = Image.fromarray(pixels)
        box = (20, 20, 20 + masks.ink.width, 20 + masks.ink.height)
        lay_on(rng, canvas, masks, box, 40, None, 1.5)
        assert legibility(canvas.crop(box), masks.ink, 40) >= 1.5
        outside = np.asarray(canvas).copy()
        outside[box[1] : box[3], box[0] : box[2]] = pixels[box[1] : box[3], box[0] : box[2]]
        assert np.array_equal(outside, pixels)


def test_legibility_is_the_contrast_of_letters_with_what_is_around_them(latin):
    """Closed form on one colour, whatever the far background is."""
    ink = Image.new("L", (120, 60))
    ImageDraw.Draw(ink).text((10, 5), "HIJ", fill=255, font=ImageFont.truetype(latin[0], 40))
    image = Image.new("RGB", ink.size, (200, 40, 40))
    image.paste((240, 240, 90), (0, 0), ink)
    expected = contrast(luminance(np.array((240, 240, 90))), luminance(np.array((200, 40, 40))))
    # Edges mix both colours and so take some of it; never is more found than there is.
    assert 0.85 * expected < legibility(image, ink, 40) < 1.01 * expected
    # One step of 255 in the dark is 8 % of a ratio.
    assert legibility(Image.new("RGB", ink.size, (9, 9, 9)), ink, 40) == pytest.approx(1, abs=0.08)
    assert legibility(image, Image.new("L", ink.size), 40) == 1
    assert contrast(luminance(np.array((0, 0, 0))), luminance(np.array((255, 255, 255)))) == pytest.approx(21)


def test_named_colours_are_apart():
    """No two are so close that jitter could make one pass for the other."""
    for a, b in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 40


@pytest.mark.parametrize("broken", ["empty", "junk", "head", "half"])
def test_a_font_that_cannot_be_read_is_counted(broken, amiri, latin, tmp_path):
    data = Path(amiri).read_bytes()
    bad = tmp_path / "bad [wght].ttf"
    bad.write_bytes({"empty": b"", "junk": b"font" * 999, "head": data[:500], "half": data[: len(data) // 2]}[broken])
    with pytest.warns(LensWarning, match="left out 1 unreadable font"):
        loaded = load_materials(config_of([str(bad), latin[0]]))
    assert len(loaded.fonts) == 1
    synthesize(0, 0, loaded)
    with pytest.raises(LensError, match=r"synthetic.fonts: none of 1 files can be used; .*bad \[wght\].ttf"):
        load_materials(config_of([str(bad)]))


def test_strings_that_no_font_has_are_counted(latin, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("fine\n漢字\npizza 🍕\n" + "x" * 100_000 + "\n", encoding="utf-8")
    with pytest.warns(LensWarning, match="2 no font has all letters, 1 too long"):
        loaded = load_materials(config_of(latin, texts=(str(lines),)))
    assert loaded.strings.lines == ("fine",)
    assert "U+6F22" in str(loaded.refused[1])
    lines.write_text("漢字\n", encoding="utf-8")
    with pytest.raises(LensError, match="no line of"):
        load_materials(config_of(latin, texts=(str(lines),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fonts": ()}, "synthetic.fonts is empty"),
        ({"fonts": ("/nowhere/*.ttf",)}, "no such file or folder"),
        ({"locales": ("ar",)}, "no font of synthetic.fonts has all letters"),
        ({"locales": ("zz",)}, "'zz' is unknown"),
        ({"backgrounds": ("/nowhere",)}, "/nowhere: no such file or folder"),
        ({"size": 9}, "synthetic.size is 9"),
        ({"style": "odd"}, "synthetic.style is 'odd'"),
    ],
)
def test_a_config_that_cannot_be_drawn_is_named(options, message, latin):
    with pytest.raises(LensError, match=message):
        load_materials(config_of(**{"fonts": latin, **options}))


def test_masks_turn_and_keep_their_ink(latin):
    """Turned by 20 degrees a wide text is higher, and has as much ink."""
    font = load_fonts(latin[:1])[0][0]
    flat, turned = (draw_block("a long text", font, Look(40, 400, angle), breakable=False) for angle in (0.0, 20.0))
    assert isinstance(flat, Masks)
    assert turned.ink.height > 2 * flat.ink.height
    amount = [np.asarray(masks.ink, float).sum() for masks in (flat, turned)]
    assert amount[1] == pytest.approx(amount[0], rel=0.03)
    # Counterclockwise: the end of the text is above its beginning.
    rows = np.asarray(turned.ink, float)
    left, right = rows[:, : rows.shape[1] // 4].sum(1), rows[:, -rows.shape[1] // 4 :].sum(1)
    assert np.average(np.arange(len(rows)), weights=right) < np.average(np.arange(len(rows)), weights=left)


def _read(materials, numbers) -> tuple[int, int, list]:
    """Words read right by an OCR, of how many, and what was read where one was not."""
    from lens_jax.posttraining.rewards.ocr import Ocr, compare

    reader = Ocr(readers=1).load()
    right, count, wrong = 0.0, 0, []
    for index in numbers:
        record = synthesize(0, index, materials)
        with Image.open(io.BytesIO(record.image)) as image:
            found = reader._read(np.asarray(image.convert("RGB")))
        got = compare(record.meta["text"], found, case=False)["words"]
        right, count = right + got, count + 1
        if got < 1:
            wrong.append((index, record.meta["text"], found))
    return right, count, wrong


def test_plain_text_is_read(latin):
    made = load_materials(config_of(latin, buckets=("384x384",), size=384, style="plain"))
    right, count, wrong = _read(made, range(6))
    assert right / count >= 0.95, wrong


@pytest.mark.slow
def test_plain_text_is_read_in_a_hundred_images(latin, pictures):
    made = load_materials(config_of(latin, ("384x384",), size=384, style="plain", backgrounds=(str(pictures),)))
    right, count, wrong = _read(made, range(100))
    assert right / count >= 0.95, wrong
