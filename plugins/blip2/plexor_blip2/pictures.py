"""Opens pictures that strangers send: known formats only, bounded in size, one frame, upright, in RGB."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

from plexor.api import RequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
_WHITE = (255, 255, 255, 255)


def open_picture(data: bytes) -> Image.Image:
    """The picture in a file's bytes, decoded, turned upright as its EXIF says; of an animation the first frame.

    Raises RequestError where the bytes are no whole picture of a known format, or one of more than MAX_PIXELS.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise RequestError(_too_large("it"), field="image") from error
    except Exception as error:  # decoders raise whatever a damaged header makes them trip over
        raise RequestError(
            f"the {len(data)} bytes sent as an image are no picture that can be read: send one of {', '.join(FORMATS)}",
            field="image",
        ) from error
    decode(image)
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # hostile EXIF data
        raise RequestError(
            "the image's EXIF data is damaged: save the image again without them", field="image"
        ) from error


def decode(image: Image.Image) -> None:
    """Decodes a picture that has been opened and not read yet; RequestError if it is too large or damaged."""
    width, height = image.size
    if width < 1 or height < 1:
        raise RequestError(f"the image is {width} by {height} pixels: send one that is not empty", field="image")
    if width * height > MAX_PIXELS:
        raise RequestError(_too_large(f"at {width} by {height} pixels it"), field="image")
    try:
        image.load()
    except Exception as error:  # as above, in the middle of the data
        raise RequestError(
            "the image is truncated or damaged, so that not all of its pixels can be read: send the whole file",
            field="image",
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """In RGB at eight bits, what is transparent laid on white; RequestError for samples without a known white.

    Sixteen-bit grey is scaled to eight bits, where Pillow's own conversion would turn all above 255 white.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise RequestError(
            f"the image has 32-bit samples (Pillow's mode {image.mode!r}), of which nothing says how bright white is: "
            "convert it to 8 bits",
            field="image",
        )
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            above = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", above.size, _WHITE), above)
        return image.convert("RGB")
    except ValueError as error:
        raise RequestError(
            f"the image's colours ({image.mode}) cannot be converted to RGB: convert it first", field="image"
        ) from error


def _too_large(what: str) -> str:
    return f"the image is too large: {what} exceeds {MAX_PIXELS} pixels, so send a smaller one"
