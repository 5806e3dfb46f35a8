"""Keeps steps as CUDA graphs: a step whose kernels and buffers are always the same is replayed in one launch.

A step that is met for the first time runs kernel by kernel, which also compiles what it needs. Met again, it is
captured, and replayed from then on. Capturing executes nothing, so no step is lost or run twice.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plexor.runtime.sampler import Settings


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """What a step drew: ids [R], logits [R, V] (valid until the next step), and what they were drawn with.

    Of a padded step the rows beyond those of its sequences are padding.
    """

    ids: Tensor
    logits: Tensor
    settings: Settings
    steps: Tensor


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    drawn: DrawnRows


class GraphMemory:
    """What captured steps of one device share: their memory, as each one's results are read before the next runs."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.renew()

    def renew(self) -> None:
        """Take other memory from now on: torch goes on recording to a pool in which a capture has failed."""
        self.pool = torch.cuda.graph_pool_handle()


class Captures:
    """Steps of one kind.

    what: their name in the warning that they cannot be captured. memory: None where steps are not captured. reports:
    whether this rank says so when a step turns out not to be capturable.
    """

    def __init__(self, what: str, memory: GraphMemory | None, *, reports: bool) -> None:
        self._what = what
        self._memory = memory
        self._reports = reports
        self._met: set[Hashable] = set()
        self._captured: dict[Hashable, _Captured] = {}

    def __len__(self) -> int:
        """How many steps are captured."""
        return len(self._captured)

    def __contains__(self, key: Hashable) -> bool:
        """Whether the step of a key is captured."""
        return key in self._captured

    def run(self, key: Hashable, step: Callable[[], DrawnRows]) -> DrawnRows:
        """Run a step that does the same for the same key."""
        if self._memory is not None and key in self._met and key not in self._captured:
            self._capture(key, step, self._memory)
        self._met.add(key)
        captured = self._captured.get(key)
        if captured is None:
            return step()
        captured.graph.replay()
        return captured.drawn

    def close(self) -> None:
        """Give up the captured graphs: they must not outlive the group of ranks whose exchanges they hold."""
        self._captured.clear()

    def _capture(self, key: Hashable, step: Callable[[], DrawnRows], memory: GraphMemory) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(memory.stream):
                drawn = _record(graph, step, memory)
        except RuntimeError as error:
            self._memory = None
            memory.renew()
            if self._reports:
                reason = str(error).partition("\n")[0]
                logging.getLogger(__name__).warning(
                    "%s run kernel by kernel, which is slower: a CUDA graph cannot hold %s (%s)",
                    self._what,
                    _origin(error),
                    reason,
                )
            return
        self._captured[key] = _Captured(graph, replace(drawn, logits=_unowned(drawn.logits)))


def _record(graph: torch.cuda.CUDAGraph, step: Callable[[], DrawnRows], memory: GraphMemory) -> DrawnRows:
    """Capture a step without waiting for what the device is running, as `torch.cuda.graph` would."""
    graph.capture_begin(pool=memory.pool, capture_error_mode="thread_local")
    try:
        drawn = step()
    except BaseException:
        with suppress(RuntimeError):  # says only that the capture has become invalid
            graph.capture_end()
        raise
    graph.capture_end()
    return drawn


def _origin(error: BaseException) -> str:
    """File and line where an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _unowned(tensor: Tensor) -> Tensor:
    """The tensor, its memory left to its pool: graphs captured later may lay theirs there, as each is read at once."""
    storage = tensor.untyped_storage()
    memory = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=tensor.device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Memory:
    """Bytes at an address of a GPU, as torch and others take them."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
