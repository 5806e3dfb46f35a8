"""Reads tensors straight onto a device, through a few buffers that its copy engine can reach.

    file --- read ---> buffer 1 --- copy ---> device        each reader has two buffers: while one is
                       buffer 2                             being copied, the other is being filled

A buffer of a GPU is pinned: only then does a copy run beside the CPU, at the full rate of the bus. Pinning takes time,
so the buffers are small and serve a whole load.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

import torch
from torch import Tensor

from plexor.checkpoint.source import TensorInfo, TensorSource, cut_shape

BUFFER_BYTES = 8 << 20
"""Large beside what starting a read and a copy takes, small enough that sixteen of them are pinned in no time."""


class StagedSource:
    """Another source's tensors on a device; a TensorSource that several threads may read from at once.

    readers: how many can be served at a time; the others wait.
    """

    def __init__(
        self, source: TensorSource, device: torch.device, readers: int, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        self._source = source
        self._device = device
        self._stages: SimpleQueue[_Stage] = SimpleQueue()
        for _ in range(readers):
            self._stages.put(_Stage(device, buffer_bytes))

    def names(self) -> tuple[str, ...]:
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """On the device; the copy may still be under way, in the order of the device's current stream."""
        info = self._source.info(name)
        whole = torch.empty(cut_shape(info.shape, index), dtype=info.dtype, device=self._device)
        stage = self._stages.get()
        try:
            stage.bring(
                whole.reshape(-1).view(torch.uint8),
                lambda target, start: self._source.read_into(target, name, index, start),
            )
        finally:
            self._stages.put(stage)
        return whole

    def read_into(self, target: memoryview, name: str, index: tuple[slice, ...] = (), start: int = 0) -> None:
        self._source.read_into(target, name, index, start)

    def close(self) -> None:
        self._source.close()


class _Stage:
    """One reader's buffers, used in turn."""

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._buffers = tuple(_Buffer(device, buffer_bytes) for _ in range(2))
        self._turn = 0

    def bring(self, target: Tensor, read: Callable[[memoryview, int], None]) -> None:
        """Fill bytes [n] on the device with what `read` puts into a buffer, given where among the n it starts."""
        start = 0
        while start < len(target):
            buffer = self._buffers[self._turn]
            self._turn = (self._turn + 1) % len(self._buffers)
            part = target[start : start + buffer.size]
            read(buffer.free(len(part)), start)
            buffer.send(part)
            start += len(part)


class _Buffer:
    """Memory of the CPU from which one copy at a time goes to the device."""

    def __init__(self, device: torch.device, size: int) -> None:
        on_gpu = device.type == "cuda"
        self.size = size
        self._device = device
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        self._left = torch.cuda.Event() if on_gpu else None

    def free(self, size: int) -> memoryview:
        """The first bytes, once the last copy has left them."""
        if self._left is not None:
            self._left.synchronize()
        content: memoryview = self._memory[:size].numpy().data
        return content

    def send(self, target: Tensor) -> None:
        """Start to copy the first bytes to the device."""
        target.copy_(self._memory[: len(target)], non_blocking=True)
        if self._left is not None:
            self._left.record(torch.cuda.current_stream(self._device))
