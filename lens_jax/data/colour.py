"""Pixels as sRGB, 8 bits a channel, whatever they were stored as: an embedded profile is believed, not dropped."""

import functools
import io

import numpy as np

from lens_jax.errors import LensError

# A profile for CMYK takes 2 MB.
MAX_PROFILE = 4 << 20
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
# Of sRGB: 1 / 2.2, and x and y of white, red, green and blue. PNG says the same with rounding.
_GAMMA, _PRIMARIES = 1 / 2.2, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


def to_srgb(image):
    """A loaded PIL image as sRGB in mode RGB, transparency on white. LensError where its colours cannot be known."""
    from PIL import Image

    profile = image.info.get("icc_profile")
    if "icc_profile" in image.info and not profile:  # what PIL makes of a damaged one in a PNG
        raise LensError("its colour profile cannot be read; remove it, or convert the image to sRGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return _converted(image, profile) if profile else image
    if image.mode.startswith(("I", "F")):  # 16-bit grey: PIL would clip at 255 instead of scaling
        grey = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    clear = "A" in image.mode or "a" in image.mode or "transparency" in image.info
    if clear:
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("RGB")
    elif image.mode not in _SPACES:  # a palette, or one bit
        image = image.convert("RGB")
    image = _converted(image, profile) if profile else image.convert("RGB")
    if clear:
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=alpha)
        return white
    return image


def check_tags(image) -> None:
    """LensError where a PNG or JPEG says without a profile that its colours are others than those of sRGB."""
    info = image.info
    if "icc_profile" in info:
        return
    if image.format == "PNG" and "srgb" not in info:
        gamma, primaries = info.get("gamma"), info.get("chromaticity")
        if gamma and abs(gamma - _GAMMA) > 0.02:
            raise LensError(f"a PNG of gamma {gamma:g}; only sRGB's, {_GAMMA:.4f}, is accepted: convert it to sRGB")
        if primaries and max(abs(a - b) for a, b in zip(primaries, _PRIMARIES)) > 0.01:
            raise LensError("a PNG of other primaries than sRGB's; convert it to sRGB")
    elif image.format in ("JPEG", "MPO") and _interoperability(image).get(1) == "R03":
        # What cameras write in place of a profile.
        raise LensError("Adobe RGB by its EXIF and without a profile; embed the profile, or convert it to sRGB")


def _interoperability(image) -> dict:
    """The part of EXIF of that name, by tag; {} where there is none, which Pillow before 13 raises KeyError for."""
    try:
        return image.getexif().get_ifd(0xA005)
    except KeyError:
        return {}


def is_srgb(profile: bytes | None) -> bool:
    """Whether an RGB image of that profile is in sRGB already. LensError for a profile that `to_srgb` refuses."""
    if not profile:
        raise LensError("its colour profile cannot be read; remove it, or convert the image to sRGB")
    space = _checked_space(profile)
    return space == "RGB " and _transform(profile, "RGB") is None


def _checked_space(profile: bytes) -> str:
    if len(profile) > MAX_PROFILE:
        raise LensError(f"its colour profile has {len(profile)} bytes; at most {MAX_PROFILE} are accepted")
    return _space(profile)


def _converted(image, profile: bytes):
    """An RGB, L or CMYK image of that profile in sRGB."""
    from PIL import ImageCms

    space = _checked_space(profile)
    if image.mode == "L" and space == "RGB ":
        image = image.convert("RGB")
    if space != _SPACES[image.mode]:
        raise LensError(f"its colour profile is for {space.strip()!r:.20}, its pixels are {image.mode}")
    transform = _transform(profile, image.mode)
    if transform is None:
        return image.convert("RGB") if image.mode != "RGB" else image
    # In place where it can be: an image may take 240 MB.
    changed = ImageCms.applyTransform(image, transform, inPlace=image.mode == "RGB")
    return image if changed is None else changed


@functools.lru_cache(16)
def _space(profile: bytes) -> str:
    from PIL import ImageCms

    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space
    except Exception as error:  # PyCMSError, OSError, ... by the kind of damage
        raise LensError("its colour profile cannot be read; remove it, or convert the image to sRGB") from error


@functools.lru_cache(16)
def _transform(profile: bytes, mode: str):
    """From the profile to sRGB; None where that moves no colour by more than rounding, as for sRGB's own profiles."""
    from PIL import Image, ImageCms

    try:
        source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
    except Exception as error:
        raise LensError("its colour profile cannot be used; remove it, or convert the image to sRGB") from error
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    before = Image.fromarray(colours if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    after = np.asarray(ImageCms.applyTransform(before, transform), np.int32)
    same = np.abs(after - np.asarray(before.convert("RGB"), np.int32)).max() <= 1
    return None if same else transform
