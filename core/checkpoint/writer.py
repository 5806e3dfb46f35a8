"""Writes tensors to safetensors files whose headers are laid out before the first tensor is known.

Every name, dtype and shape is given at the start, so a tensor goes to its place as soon as it is made and nothing is
kept. The room for all of them is taken on the disk at once: a disk that is too small is found out before any work.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

import torch
from torch import Tensor

from plexor.checkpoint.source import DTYPES, INDEX_FILE, SINGLE_FILE
from plexor.errors import CapacityError, ConfigError

MAX_FILE_BYTES: Final = 5 * 10**9
"""Of tensors in one file, unless a single one is larger; what transformers writes."""

_NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Place:
    """A planned tensor's file, and where in it the tensor starts."""

    planned: PlannedTensor
    descriptor: int
    start: int


class SafetensorsWriter:
    """Writes the planned tensors, in any order and each once, to an existing folder; `close` checks that none lacks.

    One file has the name of a whole model, several are numbered and get an index.
    """

    def __init__(self, folder: Path, tensors: Iterable[PlannedTensor], *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        files = _shared_out(tensors, max_file_bytes)
        self.num_bytes = sum(planned.num_bytes for file in files for planned in file)
        self._descriptors: list[int] = []
        self._lacking: dict[str, _Place] = {}
        self._weight_map: dict[str, str] = {}
        self._folder = folder
        try:
            for number, file in enumerate(files, start=1):
                name = SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
                self._start(folder / name, file)
                self._weight_map |= {planned.name: name for planned in file}
        except OSError as error:
            self._release()
            raise write_error(folder, error, self.num_bytes) from error

    def _start(self, path: Path, tensors: Sequence[PlannedTensor]) -> None:
        """Makes a file with its header and room for these tensors."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for planned in tensors:
            end = offset + planned.num_bytes
            shape = list(planned.shape)
            entries[planned.name] = {"dtype": _NAMES[planned.dtype], "shape": shape, "data_offsets": [offset, end]}
            offset = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        start = 8 + len(header)
        os.posix_fallocate(descriptor, 0, start + offset)
        _write_all(descriptor, memoryview(struct.pack("<Q", len(header)) + header), 0)
        for planned in tensors:
            assert planned.name not in self._lacking, f"{planned.name} is planned twice"
            self._lacking[planned.name] = _Place(planned, descriptor, start)
            start += planned.num_bytes

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of the planned dtype and shape in its place; CapacityError or ConfigError if that fails."""
        place = self._lacking.pop(name)
        planned = place.planned
        assert (tensor.dtype, tuple(tensor.shape)) == (planned.dtype, planned.shape), (name, tensor.dtype, tensor.shape)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            _write_all(place.descriptor, content, place.start)
        except OSError as error:
            raise write_error(self._folder, error, self.num_bytes) from error

    def close(self) -> tuple[str, ...]:
        """Finish the files; the names of all of them."""
        assert not self._lacking, f"{len(self._lacking)} planned tensors were not written: {next(iter(self._lacking))}"
        files = tuple(dict.fromkeys(self._weight_map.values()))
        try:
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            if len(files) > 1:
                index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self._weight_map}
                (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise write_error(self._folder, error, self.num_bytes) from error
        finally:
            self._release()
        return files

    def _release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


def write_error(folder: Path, error: OSError, num_bytes: int) -> CapacityError | ConfigError:
    """What is said of a write that the system refused; num_bytes: of all tensors of the checkpoint."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CapacityError(
            f"the disk of {folder.parent} has no room for a checkpoint with {num_bytes / 1e9:.2f} GB of tensors "
            f"({error.strerror}): free some or write elsewhere"
        )
    return ConfigError(f"{folder.parent} cannot be written to ({error.strerror}): choose another place")


def _shared_out(tensors: Iterable[PlannedTensor], max_file_bytes: int) -> list[list[PlannedTensor]]:
    """The tensors of each file in the order given; within a file wide ones first, so that each lies aligned."""
    files: list[list[PlannedTensor]] = [[]]
    used = 0
    for planned in tensors:
        if files[-1] and used + planned.num_bytes > max_file_bytes:
            files.append([])
            used = 0
        files[-1].append(planned)
        used += planned.num_bytes
    return [sorted(file, key=lambda planned: -planned.dtype.itemsize) for file in files]


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """One call of the system may take fewer bytes than it is given."""
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)
