"""Steps in which every sequence computes one token: the same code on the same buffers, so that a GPU can replay it.

    row      0    1    2    3          a bucket of 4 rows, three of them used
    slot     5    0    3   -1          sent when the set of decoding sequences changes, else left as it is
    advance  token, position, cache slot, length of each row from its slot's state, which moves on by one
    model    embedding, layers, logits
    sample   one token for each row, kept in its slot's state: the next step's input

On a GPU a bucket that is met for the first time runs kernel by kernel and is captured right after; from then on it is
replayed as one CUDA graph. Capturing executes nothing, so no step is lost or run twice.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from plexor.batch import Batch, ForwardContext, LayerCache
from plexor.model.decoder import Model
from plexor.runtime.sampler import Sampler, Settings
from plexor.runtime.state import Array, SlotState, send

PADDING = -1


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """What a step drew: ids [R], logits [R, V] (valid until the next step), and what they were drawn with.

    Of a decode step the rows beyond those of its sequences are padding.
    """

    ids: Tensor
    logits: Tensor
    settings: Settings
    steps: Tensor


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    drawn: DrawnRows


def decode_buckets(max_sequences: int) -> tuple[int, ...]:
    """Numbers of rows that are captured, in ever wider steps, so that few of a step's rows are padding."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_sequences, 64)]
    return (*(size for size in sizes if size < max_sequences), max_sequences)


class DecodeSteps:
    """Runs decode steps.

    buckets: the numbers of rows to pad to, none to run just the rows there are, uncaptured. reports: whether this rank
    says so when a step turns out not to be capturable.
    """

    def __init__(
        self,
        model: Model,
        cache: tuple[LayerCache, ...],
        state: SlotState,
        sampler: Sampler,
        *,
        buckets: Sequence[int],
        reports: bool,
    ) -> None:
        device = state.device
        self._model = model
        self._cache = cache
        self._state = state
        self._sampler = sampler
        self._buckets = tuple(buckets)
        # One run of bytes behind all that is sent when the rows change, so that they change in one copy.
        self._sent, (self._slots, *settings) = send(self.arrays(()), device)
        self._settings = Settings(*settings)
        self._reports = reports
        self._captures = bool(buckets) and device.type == "cuda"
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self._stream = torch.cuda.Stream(device) if self._captures else None

    def arrays(self, slots: Sequence[int]) -> list[Array]:
        """What the device needs to know of rows for these slots, to be sent and then given to `take_rows`."""
        padded: NDArray[numpy.int64] = numpy.full(self._state.num_slots, PADDING, dtype=numpy.int64)
        padded[: len(slots)] = slots
        return [padded, *self._sampler.settings(padded)]

    def take_rows(self, sent: Tensor) -> None:
        """The bytes that hold `arrays`, with or without others behind them."""
        self._sent.copy_(sent[: self._sent.shape[0]])

    def run(self, num_rows: int) -> DrawnRows:
        """One step of the rows taken last; the results' rows past num_rows are padding."""
        bucket = next((size for size in self._buckets if size >= num_rows), num_rows)
        captured = self._captured.get(bucket)
        if captured is not None:
            captured.graph.replay()
            return captured.drawn
        drawn = self._step(bucket)
        if self._captures:
            self._capture(bucket)
        return drawn

    def close(self) -> None:
        """Give up the captured graphs: they must not outlive the group of ranks whose exchanges they hold."""
        self._captured.clear()

    def _step(self, bucket: int) -> DrawnRows:
        state, slots = self._state, self._slots[:bucket]
        token_ids, positions, cache_slots, kv_length, steps = state.advance(slots)
        ctx = ForwardContext(state.one_row_pages(kv_length), cache_slots, None, self._cache)
        logits = self._model.logits(self._model.forward(Batch(token_ids, positions), ctx))
        settings = self._settings[:bucket]
        return DrawnRows(self._sampler.draw(logits, settings, steps, slots), logits, settings, steps)

    def _capture(self, bucket: int) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                drawn = self._record(graph, bucket)
        except RuntimeError as error:
            self._captures, self._buckets = False, ()
            if self._reports:
                reason = str(error).partition("\n")[0]
                logging.getLogger(__name__).warning(
                    "decode steps run kernel by kernel, which is slower: a CUDA graph cannot hold %s (%s)",
                    _origin(error),
                    reason,
                )
            return
        drawn = replace(drawn, logits=_unowned(drawn.logits))
        self._captured[bucket] = _Captured(graph, drawn)

    def _record(self, graph: torch.cuda.CUDAGraph, bucket: int) -> DrawnRows:
        """Capture a step without waiting for what the device is running, as `torch.cuda.graph` would."""
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            drawn = self._step(bucket)
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
