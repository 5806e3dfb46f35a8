"""The image processor: equal to transformers', and clear about pictures and folders that it cannot use."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import Blip2Processor as TheirProcessor
from transformers import PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from plexor.api import CheckpointError, RequestError
from plexor_blip2.pictures import FORMATS, MAX_PIXELS
from plexor_blip2.processor import Blip2Processor, build

SIDE = 30
IMAGE_ID = 5
QUERIES = 3
CONFIG: dict[str, Any] = {
    "image_token_index": IMAGE_ID,
    "num_query_tokens": QUERIES,
    "text_config": {"vocab_size": 12, "model_type": "opt"},
    "vision_config": {"image_size": SIDE, "patch_size": 10},
    "qformer_config": {},
}
SETTINGS: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}}


def tokenizer() -> Tokenizer:
    words = {"<s>": 0, "a": 1, "picture": 2, "of": 3, "<unk>": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def ids(prompt: str) -> list[int]:
    return list(tokenizer().encode(prompt).ids)


def processor(folder: Path, settings: dict[str, Any], config: dict[str, Any] = CONFIG) -> Blip2Processor:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return build(folder, config)


def picture(mode: str, width: int, height: int) -> Image.Image:
    """Random samples in a mode, as Pillow makes it of RGBA or of what it reads from a file."""
    generator = np.random.default_rng(width * 1000 + height)
    image = Image.fromarray(generator.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "P with a transparent colour":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        return image
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def pixels(ours: Blip2Processor, image: Image.Image) -> torch.Tensor:
    _, (media,) = ours.prepare([image], ids("a"), tokenizer())
    return torch.from_numpy(media.data)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV", "P with a transparent colour"]
)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (30, 30), (7, 53), (101, 2)])
def test_pixels_equal_those_of_transformers(tmp_path: Path, mode: str, width: int, height: int) -> None:
    image = picture(mode, width, height)
    theirs = BlipImageProcessorPil(**SETTINGS)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels(processor(tmp_path, SETTINGS), image), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": SIDE},
        {"size": [SIDE, SIDE]},
        {"resample": 0},
        {"resample": 2},
        {"rescale_factor": 1 / 127},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 2.0, 1.0]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"do_convert_rgb": False},
        {"do_convert_rgb": None, "do_center_crop": None},
    ],
)
def test_settings_mean_what_they_mean_to_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    image = picture("RGB", 41, 23)
    theirs = BlipImageProcessorPil(**{**SETTINGS, **settings})(image, return_tensors="pt")["pixel_values"][0]
    ours = pixels(processor(tmp_path, {**SETTINGS, **settings}), image)
    assert torch.equal(ours, theirs.to(torch.float32))


def test_a_picture_that_is_not_scaled_must_fit(tmp_path: Path) -> None:
    ours = processor(tmp_path, {"do_resize": False, **SETTINGS})
    image = picture("RGB", SIDE, SIDE)
    theirs = BlipImageProcessorPil(do_resize=False)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels(ours, image), theirs)
    with pytest.raises(RequestError, match="29 by 30 pixels, the model takes 30 by 30"):
        pixels(ours, picture("RGB", 29, 30))


@pytest.mark.parametrize("prompt", ["", "a picture of"])
def test_tokens_equal_those_of_transformers(tmp_path: Path, prompt: str) -> None:
    image = picture("RGB", 9, 9)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<s>")
    theirs = TheirProcessor(BlipImageProcessorPil(**SETTINGS), wrapped, num_query_tokens=QUERIES)
    expected = theirs(images=image, text=prompt)["input_ids"][0]
    tokens, (media,) = processor(tmp_path, SETTINGS).prepare([image], ids(prompt), tokenizer())
    assert tokens == list(expected)
    assert (media.kind, media.start, media.length) == ("image", 0, QUERIES)
    assert tokens[media.start : media.start + media.length] == [IMAGE_ID] * QUERIES


def test_a_prompt_without_a_picture_is_only_text(tmp_path: Path) -> None:
    assert processor(tmp_path, SETTINGS).prepare([], ids("a picture"), tokenizer()) == ([0, 1, 2], ())


def test_prompt_and_pictures_must_go_together(tmp_path: Path) -> None:
    ours, image = processor(tmp_path, SETTINGS), picture("RGB", 9, 9)
    with pytest.raises(RequestError, match="one image for each prompt, not 2"):
        ours.prepare([image, image], ids("a"), tokenizer())
    for images in ([], [image]):
        with pytest.raises(RequestError, match="leave it out of the text"):
            ours.prepare(images, ids("<image> a"), tokenizer())


def test_the_image_token_comes_from_the_tokenizer_where_the_config_lacks_it(tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "image_token_index"}
    ours, image = processor(tmp_path, SETTINGS, config), picture("RGB", 9, 9)
    assert ours.prepare([image], ids("a"), tokenizer())[0] == [IMAGE_ID] * QUERIES + [0, 1]
    plain = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(CheckpointError, match="names the token that stands for pictures"):
        ours.prepare([image], ids("a"), plain)
    small = {**config, "text_config": {"vocab_size": IMAGE_ID, "model_type": "opt"}}
    with pytest.raises(CheckpointError, match="the language half has 5 tokens"):
        processor(tmp_path, SETTINGS, small).prepare([image], ids("a"), tokenizer())


def test_digests_tell_pictures_apart_by_what_the_model_sees(tmp_path: Path) -> None:
    ours = processor(tmp_path, SETTINGS)
    one, other = picture("RGB", 20, 10), Image.frombytes("RGB", (10, 20), picture("RGB", 20, 10).tobytes())
    palettes = [Image.new("P", (4, 4), 0) for _ in range(2)]
    palettes[0].putpalette([200, 0, 0])
    palettes[1].putpalette([0, 0, 200])
    digests = [
        ours.prepare([image], ids("a"), tokenizer())[1][0].digest for image in (one, other, *palettes, one.copy())
    ]
    assert len(set(digests)) == 4
    assert digests[0] == digests[-1]


@pytest.mark.parametrize("name", FORMATS)
def test_known_formats_open(tmp_path: Path, name: str) -> None:
    buffer = BytesIO()
    Image.new("RGB", (12, 5), (255, 0, 0)).save(buffer, name)
    opened = processor(tmp_path, SETTINGS).open(buffer.getvalue())
    assert opened.size == (12, 5)
    red, green, blue = opened.convert("RGB").getpixel((6, 2))  # type: ignore[misc]
    assert red > 240 > 15 > max(green, blue)


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    buffer = BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    ours = processor(tmp_path, SETTINGS)
    assert torch.equal(pixels(ours, ours.open(buffer.getvalue())), pixels(ours, frames[0]))


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    image = picture("RGB", 6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by 90 degrees
    buffer = BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert processor(tmp_path, SETTINGS).open(buffer.getvalue()).tobytes() == image.rotate(-90, expand=True).tobytes()


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, dtype: str) -> None:
    samples = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(dtype)
    image = Image.frombytes("I;16" if dtype == "<u2" else "I;16B", (SIDE, SIDE), samples.tobytes())
    eight = Image.fromarray((samples.astype(np.int64) // 257).astype(np.uint8))
    ours = processor(tmp_path, SETTINGS)
    assert torch.equal(pixels(ours, image), pixels(ours, eight))
    if dtype == "<u2":
        assert torch.equal(pixels(ours, ours.open(png(image))), pixels(ours, eight))


def bad_files() -> dict[str, bytes]:
    whole = png(picture("RGB", 64, 64))
    jpeg, tiff = BytesIO(), BytesIO()
    picture("RGB", 64, 64).save(jpeg, "JPEG")
    picture("RGB", 8, 8).save(tiff, "TIFF")
    return {
        "empty": b"",
        "text": b"<svg onload='x'>",
        "truncated PNG": whole[: len(whole) // 2],
        "truncated JPEG": jpeg.getvalue()[:300],
        "only a header": whole[:20],
        "damaged": whole[:60] + bytes(200) + whole[260:],
        "a format that is not read": tiff.getvalue(),
    }


@pytest.mark.parametrize("name", sorted(bad_files()))
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError) as caught:
        processor(tmp_path, SETTINGS).open(bad_files()[name])
    message = str(caught.value)
    assert caught.value.field == "image"
    assert "send" in message
    assert not any(leak in message for leak in ("0x", "BytesIO", "/", "\n"))


@pytest.mark.parametrize("side", [MAX_PIXELS // 5000 + 1, 1_000_000])
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    """The header of a small file says how much it would become."""
    whole = bytearray(png(Image.new("1", (8, 8))))
    whole[16:24] = side.to_bytes(4, "big") + (5000).to_bytes(4, "big")
    whole[29:33] = crc32(whole[12:29]).to_bytes(4, "big")
    with pytest.raises(RequestError, match=f"exceeds {MAX_PIXELS} pixels"):
        processor(tmp_path, SETTINGS).open(bytes(whole))


def test_pictures_that_cannot_become_rgb_are_refused(tmp_path: Path) -> None:
    ours = processor(tmp_path, SETTINGS)
    for image, words in (
        (Image.new("F", (4, 4)), "32-bit samples"),
        (Image.new("I", (4, 4)), "32-bit samples"),
        (Image.new("La", (4, 4)), "cannot be converted"),
        (Image.new("RGB", (0, 4)), "0 by 4 pixels"),
    ):
        with pytest.raises(RequestError, match=words):
            ours.prepare([image], ids("a"), tokenizer())
    with pytest.raises(RequestError, match="mode 'L'"):
        processor(tmp_path, {"do_convert_rgb": False, **SETTINGS}).prepare(
            [Image.new("L", (4, 4))], ids("a"), tokenizer()
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": {"shortest_edge": 30}}, "fixed height and width"),
        ({"size": {"height": 40, "width": 30}}, "40 by 30 pixels, but config.json has image_size = 30"),
        ({"size": {"height": 0, "width": 30}}, "fixed height and width"),
        ({"size": "30"}, "fixed height and width"),
        ({"resample": 9}, "resample = 9"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "no deviation of them 0"),
        ({"image_std": ["a", 1, 1]}, "image_std"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"rescale_factor": "1"}, "rescale_factor"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        processor(tmp_path, {**SETTINGS, **settings})


def test_settings_are_found_where_newer_versions_keep_them(tmp_path: Path) -> None:
    nested = {"image_processor": {**SETTINGS, "image_mean": [0.0, 0.0, 0.0]}, "num_query_tokens": QUERIES}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert build(tmp_path, CONFIG).settings.mean == (0.0, 0.0, 0.0)
    assert processor(tmp_path, SETTINGS).settings.mean == (0.0, 0.0, 0.0)
    (tmp_path / "processor_config.json").write_text(json.dumps({"num_query_tokens": QUERIES}))
    assert processor(tmp_path, SETTINGS).settings.mean != (0.0, 0.0, 0.0)


def test_a_folder_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        build(tmp_path, CONFIG)
