"""Decoding of image files to upright 8-bit RGB."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
MAX_IMAGE_PIXELS = 2**28
"""Maximum size of an image: 268 million pixels, 805 MB as RGB."""
BITS_PER_SAMPLE = 258
"""TIFF tag of the number of bits per sample."""

# Pillow's default limit is lower.
Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS


class UnsupportedImage(Exception):  # noqa: N818
    """Intact image that is too large or has no unambiguous conversion to RGB.

    The message completes "must be".
    """


def decode(source: Path | str | BinaryIO) -> Image.Image:
    """Decode the first frame of an image file to RGB, as `to_rgb` does.

    Raises Pillow's errors and UnsupportedImage.
    """
    with Image.open(source) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB.

    EXIF orientation is applied, and transparent parts are composited on white. Samples of more than 8 bits
    are scaled by the range of their type; floating-point samples must be between 0 and 1. Raises
    UnsupportedImage.
    """
    if image.width * image.height > MAX_IMAGE_PIXELS:
        size = f"{image.width} x {image.height}"
        raise UnsupportedImage(f"an image of at most {MAX_IMAGE_PIXELS:,} pixels, not {size}")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_grey(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """Scale one channel of more than 8 bits to 0 to 255."""
    values = np.asarray(image)  # (H, W)
    if image.mode == "F":
        most = 1.0
        if not (values.min() >= 0 and values.max() <= most):  # also rejects NaN
            found = f"{values.min():g} to {values.max():g}"
            raise UnsupportedImage(f"an image whose floating samples are between 0 and 1, not {found}")
    elif image.mode == "I" and image.format != "PPM":  # Pillow scales PPM samples to 16 bits
        raise UnsupportedImage("an image of unsigned samples of at most 16 bits, or of floating ones")
    else:
        tags = getattr(image, "tag_v2", {})
        most = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    grey = Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))
    grey.info = {"exif": image.info["exif"]} if "exif" in image.info else {}
    return grey
