"""A picture in a message, through a shipped checkpoint that sees; skipped where none is installed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from plexor import Engine, EngineConfig, SamplingParams
from plexor.extension.catalog import Catalog
from plexor.extension.specs import Checkpoint
from plexor.kernels.table import resolve
from plexor.testing.server import RunningServer, start_server


@pytest.fixture(scope="module")
def seeing() -> Checkpoint:
    """The first checkpoint that can draw a sample of its input."""
    found = [checkpoint for checkpoint in Catalog.load(allow=None).checkpoints.values() if checkpoint.sample]
    if not found:
        pytest.skip("no installed plugin ships a model that sees")
    return found[0]


@pytest.fixture(scope="module")
def server(seeing: Checkpoint) -> Iterator[RunningServer]:
    plugins = "llama,blip2,demo"
    server = start_server(seeing.name, "--max-images", "2", "--num-blocks", "64", plugins=plugins)
    yield server
    assert server.end() == 0


def picture(seeing: Checkpoint, seed: int) -> Any:
    return resolve(seeing.sample)(seed)[0]


def message(image: Any, *, count: int = 1, text: str | None = None) -> list[Any]:
    """A message with a picture as a data URL."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}] * count
    return [{"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}]


def test_a_picture_is_described_as_in_python(server: RunningServer, seeing: Checkpoint) -> None:
    pictures = [picture(seeing, seed) for seed in (1, 2)]
    with Engine(seeing.name, config=EngineConfig(num_blocks=64, device="cpu")) as engine:
        sampling = SamplingParams(temperature=0, max_tokens=40)
        expected = [engine.generate(engine.prompts.text("", [image]), sampling)[0].text for image in pictures]
    asked = {"model": seeing.name, "temperature": 0, "max_tokens": 40}
    client: Any = server.openai
    answers = [client.chat.completions.create(**asked, messages=message(image)) for image in pictures]
    assert [answer.choices[0].message.content for answer in answers] == expected
    assert expected[0] != expected[1]
    stream = client.chat.completions.create(**asked, messages=message(pictures[0]), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected[0]


@pytest.mark.parametrize("count", [2, 3])
def test_too_many_pictures_are_refused(server: RunningServer, seeing: Checkpoint, count: int) -> None:
    """One by the model, which reads one, and one by the server's own bound."""
    client: Any = server.openai
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=seeing.name, messages=message(picture(seeing, 1), count=count))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("data", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF", b"<svg/>", b"\x89PNG\r\n\x1a\n\x00"])
def test_what_is_no_picture_is_refused(server: RunningServer, seeing: Checkpoint, data: bytes) -> None:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    part: Any = {"type": "image_url", "image_url": {"url": url}}
    client: Any = server.openai
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=seeing.name, messages=[{"role": "user", "content": [part]}], max_tokens=4)
    assert caught.value.param == "messages"
    assert "0x" not in str(caught.value)
