"""A TensorSource over tensors in memory, for tests of rules, loaders and number formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from plexor.checkpoint.source import TensorInfo

FILE = Path("memory.safetensors")


class MemorySource:
    """Gives the tensors by name, in the mapping's order; `reads` lists what was read, with the slices asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.reads: list[tuple[str, tuple[slice, ...]]] = []

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, FILE, tensor.dtype, tuple(tensor.shape), tensor.nbytes)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        assert len(index) <= self._tensors[name].dim(), f"{len(index)} slices for {name}"
        self.reads.append((name, index))
        return self._tensors[name][index].clone()

    def read_into(self, target: memoryview, name: str, index: tuple[slice, ...] = (), start: int = 0) -> None:
        content = self.read(name, index).reshape(-1).view(torch.uint8).numpy().data
        target[:] = content[start : start + len(target)]

    def close(self) -> None:
        pass
