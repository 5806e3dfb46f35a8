"""What comes through the staging buffers is what the source holds, however it is cut and however small they are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from plexor.checkpoint.source import SINGLE_FILE, open_source
from plexor.checkpoint.staging import StagedSource
from plexor.errors import CheckpointError
from plexor.testing.source import MemorySource

CPU = torch.device("cpu")


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    bound = st.none() | st.integers(-7, 7)
    return shape, tuple(slice(draw(bound), draw(bound)) for _ in range(draw(st.integers(0, len(shape)))))


@settings(max_examples=200, deadline=None)
@given(cuts(), st.integers(1, 40))
def test_any_part_through_any_buffer(
    tmp_path_factory: pytest.TempPathFactory, cut: tuple[tuple[int, ...], tuple[slice, ...]], buffer_bytes: int
) -> None:
    shape, index = cut
    folder = tmp_path_factory.mktemp("staged")
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)
    save_file({"before": torch.ones(3), "whole": whole, "after": torch.ones(3)}, folder / SINGLE_FILE)
    with open_source(folder) as files:
        for source in (files, MemorySource({"whole": whole})):
            found = StagedSource(source, CPU, 1, buffer_bytes).read("whole", index)
            assert found.is_contiguous()
            assert torch.equal(found, whole[index])


def test_names_and_infos_are_those_of_the_source() -> None:
    source = MemorySource({"b": torch.ones(3, 2), "a": torch.ones(5)})
    staged = StagedSource(source, CPU, 1)
    assert staged.names() == ("b", "a")
    assert staged.info("a") == source.info("a")


def test_more_threads_than_readers_each_get_their_own(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((50 + i, 7), float(i)) for i in range(24)}
    save_file(tensors, tmp_path / SINGLE_FILE)
    with open_source(tmp_path) as source, ThreadPoolExecutor(8) as pool:
        staged = StagedSource(source, CPU, readers=3, buffer_bytes=100)
        for name, found in zip(tensors, pool.map(staged.read, tensors), strict=True):
            assert torch.equal(found, tensors[name])


def test_a_reader_is_free_again_after_a_failure() -> None:
    class Torn(MemorySource):
        def read_into(self, target: memoryview, name: str, index: tuple[slice, ...] = (), start: int = 0) -> None:
            if name == "torn":
                raise CheckpointError("it ends early")
            super().read_into(target, name, index, start)

    staged = StagedSource(Torn({"torn": torch.ones(4), "sound": torch.ones(4)}), CPU, readers=1)
    with pytest.raises(CheckpointError, match="ends early"):
        staged.read("torn")
    assert torch.equal(staged.read("sound"), torch.ones(4))
