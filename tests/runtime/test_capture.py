"""A step is launched when it is met first, captured when it is met again, and replayed from then on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from plexor.runtime import capture
from plexor.runtime.capture import Captures, DrawnRows
from plexor.runtime.sampler import Settings


@dataclass
class Device:
    """What a GPU would be told to do."""

    log: list[str] = field(default_factory=list)
    capturing: bool = False
    pool: int = 7
    stream: None = None

    def make_graph(self) -> Graph:
        return Graph(self)

    def renew(self) -> None:
        self.log.append("other memory")


class Graph:
    def __init__(self, device: Device) -> None:
        self._device = device

    def capture_begin(self, *, pool: int, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == (7, "thread_local")
        self._device.capturing = True

    def capture_end(self) -> None:
        self._device.capturing = False

    def replay(self) -> None:
        self._device.log.append("replay")


class Step:
    """Says whether it ran or was captured; its result tells which call made it."""

    def __init__(self, device: Device, error: str = "") -> None:
        self._device = device
        self._error = error
        self._calls = 0

    def __call__(self) -> DrawnRows:
        if self._device.capturing and self._error:
            raise RuntimeError(self._error)
        self._device.log.append("captured" if self._device.capturing else "ran")
        self._calls += 1
        number = torch.tensor([self._calls])
        return DrawnRows(number, number, Settings(*[number] * 5), number)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", device.make_graph)
    monkeypatch.setattr(capture, "_unowned", lambda tensor: tensor)
    return device


def captures(device: Any, *, reports: bool = True) -> Captures:
    return Captures("steps of a test", device, reports=reports)


def test_the_second_meeting_is_captured_and_replayed_at_once(device: Device) -> None:
    steps, step = captures(device), Step(device)
    drawn = [int(steps.run("a", step).ids) for _ in range(4)]
    assert device.log == ["ran", "captured", "replay", "replay", "replay"]
    assert drawn == [1, 2, 2, 2]
    assert len(steps) == 1


def test_each_key_is_met_by_itself(device: Device) -> None:
    steps = captures(device)
    for key in "abab":
        steps.run(key, Step(device))
    assert device.log == ["ran", "ran", "captured", "replay", "captured", "replay"]
    steps.close()
    assert len(steps) == 0


def test_what_cannot_be_captured_runs_and_is_said_once(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    steps, step = captures(device), Step(device, "it waits for the device\nand more")
    with caplog.at_level(logging.WARNING):
        drawn = [int(steps.run(key, step).ids) for key in "aaabb"]
    assert drawn == [1, 2, 3, 4, 5]
    assert device.log == ["ran", "other memory", *["ran"] * 4]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "steps of a test run kernel by kernel, which is slower: a CUDA graph cannot hold"
    )
    assert "test_capture.py" in record.getMessage()
    assert record.getMessage().endswith("(it waits for the device)")


def test_other_ranks_say_nothing(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    steps, step = captures(device, reports=False), Step(device, "no")
    for _ in range(2):
        steps.run("a", step)
    assert not caplog.records


def test_without_memory_nothing_is_captured(device: Device) -> None:
    steps, step = captures(None), Step(device)
    for _ in range(3):
        steps.run("a", step)
    assert device.log == ["ran"] * 3
