"""Turns a picture and a prompt into placeholder tokens and pixels, equal to what transformers' Blip2Processor gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from PIL import Image

from plexor.api import CheckpointError, Fields, Media, RequestError, read_object
from plexor_blip2.config import Blip2Config, config
from plexor_blip2.pictures import decode, open_picture, to_rgb

IMAGE_TOKEN = "<image>"
_NESTED_FILE = "processor_config.json"
_FILE = "preprocessor_config.json"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What is done to a picture, in this order.

    size: (height, width) to scale to, None to leave it. resample: Pillow's number of the filter. factor: that samples
    of 0 to 255 are multiplied by, None for 1. mean, deviation: of each channel, None to leave the samples as they are.
    """

    convert: bool
    size: tuple[int, int] | None
    resample: Image.Resampling
    factor: float | None
    mean: tuple[float, float, float] | None
    deviation: tuple[float, float, float] | None

    def apply(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """[3, h, w]"""
        image = to_rgb(image) if self.convert else image
        if image.mode != "RGB":
            raise RequestError(
                f"the image is in mode {image.mode!r}, and {_FILE} says that pictures are not converted "
                "(do_convert_rgb): send RGB",
                field="image",
            )
        if self.size is not None:
            image = image.resize(self.size[::-1], resample=self.resample)
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32)
        if self.factor is not None:
            pixels = (pixels.astype(np.float64) * self.factor).astype(np.float32)
        if self.mean is not None and self.deviation is not None:
            pixels = (pixels - _column(self.mean)) / _column(self.deviation)
        return np.ascontiguousarray(pixels)


@dataclass(frozen=True, slots=True)
class Blip2Processor:
    """A MediaProcessor."""

    model: Blip2Config
    settings: ImageSettings

    def open(self, data: bytes) -> Image.Image:
        """The picture in a file's bytes; RequestError if it is none, damaged, or too large."""
        return open_picture(data)

    def prepare(
        self, images: Sequence[Image.Image], prompt_ids: Sequence[int], tokenizer: tokenizers.Tokenizer
    ) -> tuple[list[int], tuple[Media, ...]]:
        """The placeholder tokens of at most one picture, then the prompt's tokens.

        Raises RequestError for more pictures than one, for a prompt that holds a placeholder itself, and for a picture
        that cannot be read.
        """
        token_id = self._image_token_id(tokenizer)
        if token_id in prompt_ids:
            raise RequestError(
                "the prompt holds the token that stands for pictures, which BLIP-2 has before the prompt alone: "
                "leave it out of the text, and send an image beside it",
                field="prompt",
            )
        if not images:
            return list(prompt_ids), ()
        if len(images) > 1:
            raise RequestError(f"BLIP-2 reads one image for each prompt, not {len(images)}: send one", field="image")
        if token_id is None:
            raise CheckpointError(
                f"neither config.json (image_token_index) nor the tokenizer ({IMAGE_TOKEN!r}) names the token that "
                "stands for pictures: take a newer version of the checkpoint"
            )
        num_queries = self.model.qformer.num_queries
        pixels = self._pixels(images[0])
        media = Media("image", 0, num_queries, _digest(pixels), pixels)
        return [token_id] * num_queries + list(prompt_ids), (media,)

    def _pixels(self, image: Image.Image) -> npt.NDArray[np.float32]:
        decode(image)
        pixels = self.settings.apply(image)
        side = self.model.vision.image_size
        if pixels.shape != (3, side, side):
            height, width = pixels.shape[1:]
            raise RequestError(
                f"the image is {width} by {height} pixels, the model takes {side} by {side}, and {_FILE} says that "
                "pictures are not scaled (do_resize): scale it",
                field="image",
            )
        return pixels

    def _image_token_id(self, tokenizer: tokenizers.Tokenizer) -> int | None:
        if self.model.image_token_id is not None:
            return self.model.image_token_id
        token_id: int | None = tokenizer.token_to_id(IMAGE_TOKEN)
        if token_id is not None and token_id >= self.model.vocab_size:
            raise CheckpointError(
                f"the tokenizer gives {IMAGE_TOKEN!r} the id {token_id}, but the language half has "
                f"{self.model.vocab_size} tokens: take tokenizer and weights from the same checkpoint"
            )
        return token_id


def build(folder: Path, raw_config: Mapping[str, Any]) -> Blip2Processor:
    """CheckpointError where the folder says nothing of its pictures, or asks for what BLIP-2 does not do."""
    model = config(raw_config)
    settings = read_settings(_fields(folder))
    side = model.vision.image_size
    if settings.size not in (None, (side, side)):
        assert settings.size is not None
        raise CheckpointError(
            f"{_FILE} scales pictures to {settings.size[0]} by {settings.size[1]} pixels, but config.json has "
            f"image_size = {side} in vision_config: correct one of them"
        )
    return Blip2Processor(model, settings)


def read_settings(fields: Fields) -> ImageSettings:
    """From the object of `preprocessor_config.json`, in the old forms of `size` and the new one."""
    for name in ("do_center_crop", "do_pad"):
        if fields.flag(name, False):
            raise CheckpointError(f"{_FILE} sets {name}, which no BLIP-2 processor does: correct the file")
    normalises = fields.flag("do_normalize", True)
    return ImageSettings(
        convert=fields.flag("do_convert_rgb", True),
        size=_size(fields) if fields.flag("do_resize", True) else None,
        resample=_resample(fields),
        factor=fields.number("rescale_factor", 1 / 255) if fields.flag("do_rescale", True) else None,
        mean=_channels(fields, "image_mean", _MEAN) if normalises else None,
        deviation=_channels(fields, "image_std", _DEVIATION) if normalises else None,
    )


def _fields(folder: Path) -> Fields:
    """As transformers does, prefer the section of the newer file, which older ones of that name lack."""
    nested = read_object(folder / _NESTED_FILE) if (folder / _NESTED_FILE).is_file() else {}
    if "image_processor" in nested:
        return Fields(nested, _NESTED_FILE).section("image_processor")
    if (folder / _FILE).is_file():
        return Fields(read_object(folder / _FILE), _FILE)
    raise CheckpointError(
        f"{folder} has no {_FILE}, which says how pictures are scaled and normalised: download the checkpoint again"
    )


def _size(fields: Fields) -> tuple[int, int]:
    """(height, width), from 224, [224, 224] or {"height": 224, "width": 224}."""
    size = fields.raw.get("size", {"height": 384, "width": 384})
    if isinstance(size, Mapping) and {key for key in size if size[key] is not None} == {"height", "width"}:
        size = [size["height"], size["width"]]
    if _is_side(size):
        size = [size, size]
    if not isinstance(size, list) or len(size) != 2 or not all(_is_side(side) for side in size):
        raise CheckpointError(
            f"{_FILE} has size = {fields.raw.get('size')!r}, which must be a fixed height and width: correct the file"
        )
    return size[0], size[1]


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 16384


def _resample(fields: Fields) -> Image.Resampling:
    number = fields.integer("resample", Image.Resampling.BICUBIC.value, least=0)
    try:
        return Image.Resampling(number)
    except ValueError as error:
        known = ", ".join(f"{filter_.value} ({filter_.name.lower()})" for filter_ in Image.Resampling)
        raise CheckpointError(f"{_FILE} has resample = {number}, but Pillow's filters are {known}") from error


def _channels(fields: Fields, name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = fields.raw.get(name)
    if value is None:
        return default
    value = value if isinstance(value, list) else [value] * 3
    numbers = [float(item) for item in value if isinstance(item, int | float) and np.isfinite(item)]
    if len(numbers) != 3 or len(value) != 3 or (name == "image_std" and 0.0 in numbers):
        raise CheckpointError(
            f"{_FILE} has {name} = {fields.raw.get(name)!r}, which must be three numbers, no deviation of them 0: "
            "correct the file"
        )
    return numbers[0], numbers[1], numbers[2]


def _column(values: tuple[float, float, float]) -> npt.NDArray[np.float32]:
    return np.array(values, dtype=np.float32).reshape(3, 1, 1)


def _digest(pixels: npt.NDArray[np.float32]) -> bytes:
    """Of the pixels that the model gets and their shape, which without the shape would fit other pictures too."""
    return sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
