"""The writer against the library of the format, in one file and in several, and what it says of a disk that refuses."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plexor.checkpoint.source import open_source
from plexor.checkpoint.writer import PlannedTensor, SafetensorsWriter
from plexor.errors import CapacityError, ConfigError


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(7, 13, generator=generator)
    return {
        "one.weight": drawn.to(torch.float8_e4m3fn),
        "one.scale": drawn[:, :1].clone(),
        "two.weight": drawn.bfloat16().T,
        "shape": torch.tensor([7, 13]),
        "number": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "codes": (drawn * 20).to(torch.int8),
    }


def planned(of: dict[str, Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in of.items()]


@pytest.mark.parametrize("max_file_bytes", [1 << 30, 200, 1])
def test_the_library_and_the_source_read_what_was_written(tmp_path: Path, max_file_bytes: int) -> None:
    given = tensors()
    with SafetensorsWriter(tmp_path, planned(given), max_file_bytes=max_file_bytes) as writer:
        for name in reversed(given):
            writer.write(name, given[name])
        files = writer.close()
    assert (files == ("model.safetensors",)) == (max_file_bytes > 1000)
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    source = open_source(tmp_path)
    assert found.keys() == given.keys() == set(source.names())
    for name, tensor in given.items():
        for read in (found[name], source.read(name)):
            assert read.dtype == tensor.dtype
            assert torch.equal(read.float(), tensor.float())
    source.close()


def test_files_stay_below_their_size_and_the_index_adds_them_up(tmp_path: Path) -> None:
    given = {f"layer.{index}": torch.full((10,), float(index)) for index in range(9)}
    with SafetensorsWriter(tmp_path, planned(given), max_file_bytes=100) as writer:
        for name, tensor in given.items():
            writer.write(name, tensor)
        files = writer.close()
    assert files == tuple(f"model-{number:05}-of-00005.safetensors" for number in range(1, 6))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 9 * 40
    assert index["weight_map"]["layer.8"] == files[4]


def test_a_tensor_is_written_once_as_planned_and_none_is_left_out(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, planned({"one": torch.ones(3), "two": torch.ones(2)})) as writer:
        with pytest.raises(AssertionError, match="one"):
            writer.write("one", torch.ones(4))
        with pytest.raises(AssertionError, match="not written: two"):
            writer.close()


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, CapacityError), (errno.EROFS, ConfigError)])
def test_a_disk_that_refuses_is_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(number, "refused")

    given = {"one": torch.ones(300)}
    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(error, match=f"{tmp_path.parent} .*refused"):
        SafetensorsWriter(tmp_path, planned(given))
    monkeypatch.undo()
    (tmp_path / "model.safetensors").unlink()
    with SafetensorsWriter(tmp_path, planned(given)) as writer:
        monkeypatch.setattr("os.pwrite", refuse)
        with pytest.raises(error, match="refused"):
            writer.write("one", given["one"])
