"""Steps with pieces of prompts: first a row for each decode, then the rows of each piece.

    sequence    0   1   2     3   4            a step of 2 decodes and 2 pieces, of which one draws a token
    row         r   r   rrrr  rr  .....        padded to 5 sequences and 16 rows: a sequence without rows, rows of none
    draws       x   x   x     -   -

A step of few rows takes a GPU less time than its kernels take to launch. Such steps are padded to a few sizes, so that
they can be captured and replayed; there decodes are attended like pieces of one row. Longer ones run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from plexor.batch import Batch, ForwardContext, LayerCache, LogitRows, MediaRows, Pages, Prefill
from plexor.model.decoder import Model
from plexor.runtime.capture import Captures, DrawnRows
from plexor.runtime.packer import KnownPiece, StepInput
from plexor.runtime.sampler import Sampler, Settings
from plexor.runtime.state import PADDING, Array, SlotState, send, views

ROWS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
"""To which the rows of a step are padded. More of them keep a GPU busy for longer than their kernels take to launch."""

SEQUENCES = (1, 4, 16, 64, 256)

WARM_SEQUENCES = 16
"""Of the steps with decodes that are captured beforehand."""

LONGEST_DECODE = 8192
"""Entries of a decode that is attended like a piece: one program goes through all of them."""


@dataclass(frozen=True, slots=True)
class Size:
    """Rows and sequences of a step, and whether decodes are among them."""

    rows: int
    sequences: int
    decodes: bool


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the device is told of a step of R rows and S sequences, in the order in which it is sent.

    owners: slot of each sequence, 0 for padding. decodes, begins, draws: slots of those sequences that decode, that
    draw a token for the first time in their slot, and of both; else PADDING. last_rows: of each sequence, 0 for
    padding. Of rows and sequences that decode, `advance` gives the rest.
    """

    owners: Tensor  # [S] int64
    decodes: Tensor  # [S] int64
    begins: Tensor  # [S] int64
    draws: Tensor  # [S] int64
    temperature: Tensor  # [S], and so on, as in Settings
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    query_start: Tensor  # [S + 1] int32
    last_rows: Tensor  # [S] int64
    token_ids: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    cache_slots: Tensor  # [R] int64, PADDING stores nothing
    kv_length: Tensor  # [S] int32
    steps: Tensor  # [S] int64: which token of its answer a sequence draws

    @property
    def settings(self) -> Settings:
        return Settings(self.temperature, self.top_k, self.top_p, self.min_p, self.seeds)


class PieceSteps:
    """Runs steps with pieces.

    captures: of the steps that are padded; None to pad none.
    """

    def __init__(
        self,
        model: Model,
        cache: tuple[LayerCache, ...],
        state: SlotState,
        sampler: Sampler,
        *,
        captures: Captures | None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._state = state
        self._sampler = sampler
        self._captures = captures
        self._sequences = (*(size for size in SEQUENCES if size < state.num_slots), min(SEQUENCES[-1], state.num_slots))
        self._buffer: Tensor | None = None  # what the padded step that runs last was told
        self._inputs: dict[Size, _Inputs] = {}  # for each size, how that is read

    def run(self, step: StepInput, media: tuple[MediaRows, ...]) -> DrawnRows:
        """One step; of its results those rows count that draw: the decodes, then the pieces that do."""
        state, size = self._state, None if media else self._padded(step)
        blocks = state.new_blocks(step.blocks)
        arrays = self._arrays(step, size or _exact(step))
        sent, received = send([*arrays, *blocks], state.device)
        state.write_blocks(*received[-2:])
        if size is None or self._captures is None:
            return self._whole_step(step, _Inputs(*received[:-2]), media)
        return self._captures.run(size, partial(self._padded_step, self._take(sent, arrays, size), size))

    def warm_up(self, num_rows: int) -> None:
        """Compile, plan and capture what steps of up to so many rows run; before the first sequence: the entries of the
        first block are overwritten.
        """
        if self._captures is not None:
            some = next((count for count in self._sequences if count >= WARM_SEQUENCES), self._sequences[-1])
            for rows in ROWS:
                for size in (Size(rows, self._sequences[0], False), Size(rows, min(some, rows), True)):
                    self._warm_up(size, self._captures)
        # The context may end with the first entry of a sequence's last block.
        longest = (self._state.block_table.shape[1] - 1) * self._state.block_size + 1
        for count in sorted({min(count, self._state.num_slots) for count in (1, 8, 64)}):
            length = min(num_rows // count, longest)
            if length > 0:
                self.run(_of_nobody([length] * count), ())

    def _warm_up(self, size: Size, captures: Captures) -> None:
        arrays = self._arrays(_of_nobody([1]), size)
        sent, _ = send(arrays, self._state.device)
        step = partial(self._padded_step, self._take(sent, arrays, size), size)
        for _ in range(2):
            captures.run(size, step)

    def close(self) -> None:
        if self._captures is not None:
            self._captures.close()

    def _padded(self, step: StepInput) -> Size | None:
        """The size that a step is padded to, None for one that is not."""
        if self._captures is None or any(self._state.num_entries(slot) > LONGEST_DECODE for slot in step.decodes):
            return None
        exact = _exact(step)
        sequences = _at_least(exact.sequences, self._sequences)
        rows = None if sequences is None else _at_least(max(exact.rows, sequences), ROWS)
        return None if sequences is None or rows is None else Size(rows, sequences, exact.decodes)

    def _arrays(self, step: StepInput, size: Size) -> list[Array]:
        """What `_Inputs` holds. The table of a slot's blocks must be up to date."""
        pieces, num_decodes = step.pieces, len(step.decodes)
        slots = [*step.decodes, *(piece.slot for piece in pieces)]
        begins = [piece.slot if piece.draws >= 0 else PADDING for piece in pieces]
        draws = _filled([*step.decodes, *begins], size.sequences, PADDING)
        ends = numpy.array([1] * num_decodes + [len(piece.token_ids) for piece in pieces], dtype=numpy.int32).cumsum()
        positions = [numpy.arange(piece.start, piece.start + len(piece.token_ids)) for piece in pieces]
        entries = [self._state.cache_slots(p.slot, where) for p, where in zip(pieces, positions, strict=True)]
        unknown: list[NDArray[numpy.int64]] = [numpy.zeros(num_decodes, dtype=numpy.int64)]
        token_ids = [numpy.array(piece.token_ids, dtype=numpy.int64) for piece in pieces]
        lengths = [0] * num_decodes + [piece.start + len(piece.token_ids) for piece in pieces]
        return [
            _filled(slots, size.sequences, 0),
            _filled(step.decodes, size.sequences, PADDING),
            _filled([PADDING] * num_decodes + begins, size.sequences, PADDING),
            draws,
            *self._sampler.settings(draws),
            numpy.concatenate([[0], _filled(ends, size.sequences, ends[-1])]).astype(numpy.int32),
            _filled(ends - 1, size.sequences, 0),
            _filled(numpy.concatenate(unknown + token_ids), size.rows, 0),
            _filled(numpy.concatenate(unknown + positions), size.rows, 0),
            _filled(numpy.concatenate(unknown + entries), size.rows, PADDING),
            _filled(lengths, size.sequences, 0).astype(numpy.int32),
            _filled([0] * num_decodes + [max(piece.draws, 0) for piece in pieces], size.sequences, 0),
        ]

    def _take(self, sent: Tensor, arrays: Sequence[Array], size: Size) -> _Inputs:
        """Copy what was sent to where steps of this size read it."""
        if self._buffer is None:
            most = max(ROWS[-1], self._sequences[-1])
            self._buffer = torch.zeros(_bytes_of(most), dtype=torch.uint8, device=sent.device)
        if size not in self._inputs:
            self._inputs[size] = _Inputs(*views(self._buffer, arrays))
        end = min(self._buffer.shape[0], sent.shape[0])
        self._buffer[:end].copy_(sent[:end])
        return self._inputs[size]

    def _padded_step(self, inputs: _Inputs, size: Size) -> DrawnRows:
        self._complete(inputs, size.decodes)
        table = self._state.row_table[: size.sequences]
        pages = Pages(inputs.query_start, inputs.kv_length, table, max_query=size.rows)
        return self._draw(inputs, pages, ())

    def _whole_step(self, step: StepInput, inputs: _Inputs, media: tuple[MediaRows, ...]) -> DrawnRows:
        num_decodes = len(step.decodes)
        self._complete(inputs, num_decodes > 0)
        pages = Pages(
            inputs.query_start,
            inputs.kv_length,
            self._state.row_table[: inputs.kv_length.shape[0]],
            max_query=max(len(piece.token_ids) for piece in step.pieces),
            num_decodes=num_decodes,
            prefills=tuple(_prefills(step)),
        )
        return self._draw(inputs, pages, media)

    def _complete(self, inputs: _Inputs, decodes: bool) -> None:
        """Bring the row table up to date, and put what `advance` gives of decodes in its places among the inputs."""
        self._state.fill_rows(inputs.owners)
        if not decodes:
            return
        is_decode, count = inputs.decodes >= 0, inputs.decodes.shape[0]
        of_rows = (tensor[:count] for tensor in (inputs.token_ids, inputs.positions, inputs.cache_slots))
        places = (*of_rows, inputs.kv_length, inputs.steps)
        for known, place in zip(self._state.advance(inputs.decodes), places, strict=True):
            torch.where(is_decode, known, place, out=place)

    def _draw(self, inputs: _Inputs, pages: Pages, media: tuple[MediaRows, ...]) -> DrawnRows:
        state = self._state
        logit_rows = LogitRows(inputs.last_rows, state.one_row_pages(inputs.kv_length))
        ctx = ForwardContext(pages, inputs.cache_slots, logit_rows, self._cache)
        batch = Batch(inputs.token_ids, inputs.positions, media)
        logits = self._model.logits(self._model.forward(batch, ctx))
        ids = self._sampler.draw(logits, inputs.settings, inputs.steps, inputs.draws)
        state.begin(inputs.begins, inputs.kv_length, inputs.steps + 1)
        return DrawnRows(ids, logits, inputs.settings, inputs.steps)


def _exact(step: StepInput) -> Size:
    rows = len(step.decodes) + sum(len(piece.token_ids) for piece in step.pieces)
    return Size(rows, len(step.decodes) + len(step.pieces), bool(step.decodes))


def _of_nobody(lengths: Sequence[int]) -> StepInput:
    """A step with pieces of so many rows of no sequence, which draws nothing."""
    pieces = [KnownPiece(0, 0, [0] * length, PADDING) for length in lengths]
    return StepInput(step=-1, decodes=[], pieces=pieces, blocks=[], new=[], media=[])


def _at_least(number: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if size >= number), None)


def _prefills(step: StepInput) -> Iterator[Prefill]:
    row = len(step.decodes)
    for sequence, piece in enumerate(step.pieces, start=row):
        count = len(piece.token_ids)
        yield Prefill(sequence, row, count, piece.start + count)
        row += count


def _filled(values: Sequence[int] | NDArray[numpy.int64], size: int, padding: int) -> NDArray[numpy.int64]:
    whole: NDArray[numpy.int64] = numpy.full(size, padding, dtype=numpy.int64)
    whole[: len(values)] = values
    return whole


def _bytes_of(count: int) -> int:
    """Room for the inputs of so many rows and sequences: 16 fields of at most 8 bytes each, aligned."""
    return 16 * 8 * (count + 8)
