"""Steps in which every sequence computes one token: the same code on the same buffers, so that a GPU can replay it.

row      0    1    2    3          a bucket of 4 rows, three of them used
slot     5    0    3   -1          sent when the set of decoding sequences changes, else left as it is
advance  token, position, cache slot, length of each row from its slot's state, which moves on by one
model    embedding, layers, logits
sample   one token for each row, kept in its slot's state: the next step's input
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy
from numpy.typing import NDArray
from torch import Tensor

from plexor.batch import Batch, ForwardContext, LayerCache
from plexor.model.decoder import Model
from plexor.runtime.capture import Captures, DrawnRows
from plexor.runtime.sampler import Sampler, Settings
from plexor.runtime.state import PADDING, Array, SlotState, send

PASSING_STEPS = 8


def decode_buckets(max_sequences: int) -> tuple[int, ...]:
    """Numbers of rows that are captured, in ever wider steps, so that few of a step's rows are padding."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_sequences, 64)]
    return (*(size for size in sizes if size < max_sequences), max_sequences)


class DecodeSteps:
    """Runs decode steps.

    buckets: the numbers of rows to pad to, none to run just the rows there are. captures: of these steps.
    """

    def __init__(
        self,
        model: Model,
        cache: tuple[LayerCache, ...],
        state: SlotState,
        sampler: Sampler,
        *,
        buckets: Sequence[int],
        captures: Captures,
    ) -> None:
        self._model = model
        self._cache = cache
        self._state = state
        self._sampler = sampler
        self._buckets = tuple(buckets)
        # One run of bytes behind all that is sent when the rows change, so that they change in one copy.
        self._sent, (self._slots, *settings) = send(self.arrays(()), state.device)
        self._settings = Settings(*settings)
        self._captures = captures
        self._met: Counter[int] = Counter()

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
        bucket = self._bucket(num_rows)
        return self._captures.run(bucket, partial(self._step, bucket))

    def warm_up(self) -> None:
        """Compile and capture every bucket; before the first rows are taken, when all that it would run is padding."""
        for bucket in self._buckets:
            for _ in range(2):
                self._captures.run(bucket, partial(self._step, bucket))

    def close(self) -> None:
        self._captures.close()

    def _bucket(self, num_rows: int) -> int:
        """The next larger one, or for its first few steps one up to twice as large that is captured already: numbers of
        rows that only come by, as requests end, are not worth a capture.
        """
        fitting = [size for size in self._buckets if size >= num_rows]
        if not fitting:
            return num_rows
        self._met[fitting[0]] += 1
        if self._met[fitting[0]] > PASSING_STEPS:
            return fitting[0]
        return next((size for size in fitting if size in self._captures and size <= 2 * num_rows), fitting[0])

    def _step(self, bucket: int) -> DrawnRows:
        state, slots = self._state, self._slots[:bucket]
        token_ids, positions, cache_slots, kv_length, steps = state.advance(slots)
        ctx = ForwardContext(state.one_row_pages(kv_length), cache_slots, None, self._cache)
        logits = self._model.logits(self._model.forward(Batch(token_ids, positions), ctx))
        settings = self._settings[:bucket]
        return DrawnRows(self._sampler.draw(logits, settings, steps, slots), logits, settings, steps)
