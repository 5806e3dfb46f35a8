"""Turns a plan into the flat lists that every rank's runner needs, in a form that travels as bytes.

    pieces          A: tokens 4 to 7 of a prompt      B: a decode, its token still on the device
    token_ids       17 3 99                           0
    positions       4 5 6                             12
    previous_rows   -1 -1 -1                          2      row of the previous step's drawn ids
    query_start     0                                 3  4
    logit_rows                                        3

`msgspec.msgpack.encode(step)` and `decode(data, type=StepInput)` carry it to other processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy

from plexor.runtime.request import Media, SamplingParams
from plexor.runtime.sequence import Sequence

if TYPE_CHECKING:
    from plexor.runtime.scheduler import Piece, Plan


class SequenceMedia(msgspec.Struct, frozen=True, kw_only=True):
    """A medium of a newly admitted sequence; index is its place in the request."""

    index: int
    kind: str
    length: int
    digest: bytes
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> numpy.ndarray:
        """The content, a writable copy, as `torch.from_numpy` wants it."""
        return numpy.frombuffer(bytearray(self.data), dtype=self.dtype).reshape(self.shape)


class NewSequence(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that starts in this step, or starts again after preemption: replaces whatever its slot held.

    media: those of which this and later steps still need embeddings; cached prefixes need none.
    """

    slot: int
    request_id: str
    prompt_ids: list[int]
    generated_ids: list[int]
    sampling: SamplingParams
    seed: int
    end_ids: tuple[int, ...]
    media: tuple[SequenceMedia, ...]


class MediaSpan(msgspec.Struct, frozen=True, kw_only=True):
    """Rows row to row + count of the batch get embeddings first to first + count of a medium of the slot's sequence."""

    slot: int
    index: int
    first: int
    row: int
    count: int


class StepInput(msgspec.Struct, frozen=True, kw_only=True):
    """One step of T tokens, S pieces and R rows that draw a token.

    token_ids [T]: 0 where previous_rows is not -1. previous_rows [T]: -1, or the row of the ids drawn by the step
    launched before this one. positions [T]. slots [T]: where each token's cache entry goes. query_start [S + 1].
    kv_length [S]: entries of each sequence after this step. block_table [S]: as many blocks as kv_length needs.
    logit_rows [R]: batch rows. row_slots [R]: the sampler's slot. row_steps [R]: which of its sequence's generated
    tokens a row draws, from 0. new: to be applied before the step's rows are drawn.
    """

    step: int
    token_ids: list[int]
    previous_rows: list[int]
    positions: list[int]
    slots: list[int]
    query_start: list[int]
    kv_length: list[int]
    block_table: list[list[int]]
    logit_rows: list[int]
    row_slots: list[int]
    row_steps: list[int]
    new: list[NewSequence]
    media: list[MediaSpan]


def pack(plan: Plan, *, block_size: int) -> StepInput:
    """The lists of a plan; to be called right after `schedule`, before anything else changes its sequences."""
    step = StepInput(
        step=plan.step,
        token_ids=[],
        previous_rows=[],
        positions=[],
        slots=[],
        query_start=[0],
        kv_length=[],
        block_table=[],
        logit_rows=[],
        row_slots=[],
        row_steps=[],
        new=[],
        media=[],
    )
    admitted = set(plan.admitted)
    for piece in plan.pieces:
        if piece.sequence in admitted:
            step.new.append(_new_sequence(piece.sequence, piece.start))
        _add_piece(step, piece, block_size)
    return step


def _add_piece(step: StepInput, piece: Piece, block_size: int) -> None:
    sequence, start, end = piece.sequence, piece.start, piece.start + piece.length
    step.media.extend(_media_spans(piece, first_row=len(step.token_ids)))
    step.token_ids.extend(sequence.tokens[start:end] if piece.previous_row < 0 else [*sequence.tokens[start:], 0])
    step.previous_rows.extend([-1] * (piece.length - 1) + [piece.previous_row])
    step.positions.extend(range(start, end))
    blocks = sequence.blocks[: -(-end // block_size)]
    step.slots.extend(blocks[p // block_size] * block_size + p % block_size for p in range(start, end))
    step.query_start.append(len(step.token_ids))
    step.kv_length.append(end)
    step.block_table.append(blocks)
    if piece.samples:
        step.logit_rows.append(len(step.token_ids) - 1)
        step.row_slots.append(sequence.slot)
        step.row_steps.append(end - sequence.num_prompt)


def _media_spans(piece: Piece, first_row: int) -> list[MediaSpan]:
    spans = []
    for index, medium in enumerate(piece.sequence.request.media):
        start = max(piece.start, medium.start)
        end = min(piece.start + piece.length, medium.start + medium.length)
        if start < end:
            row = first_row + start - piece.start
            first = start - medium.start
            spans.append(MediaSpan(slot=piece.sequence.slot, index=index, first=first, row=row, count=end - start))
    return spans


def _new_sequence(sequence: Sequence, start: int) -> NewSequence:
    request = sequence.request
    return NewSequence(
        slot=sequence.slot,
        request_id=request.id,
        prompt_ids=sequence.tokens[: sequence.num_prompt],
        generated_ids=sequence.tokens[sequence.num_prompt :],
        sampling=request.sampling,
        seed=sequence.seed,
        end_ids=request.end_ids,
        media=tuple(
            _sequence_media(index, medium)
            for index, medium in enumerate(request.media)
            if medium.start + medium.length > start
        ),
    )


def _sequence_media(index: int, medium: Media) -> SequenceMedia:
    array = numpy.ascontiguousarray(numpy.asarray(medium.data))
    return SequenceMedia(
        index=index,
        kind=medium.kind,
        length=medium.length,
        digest=medium.digest,
        dtype=array.dtype.str,
        shape=array.shape,
        data=array.tobytes(),
    )
