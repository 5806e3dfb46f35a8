"""Turns a plan into what every rank's runner needs and does not know yet, in a form that travels as bytes.

    decodes   slots 3 0 5                 all that they compute is on the device already
    pieces    slot 1, from position 4:    tokens 17 3 99 of a prompt
    blocks    slot 0, block 7:            12, which has just been allocated

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


class NewBlocks(msgspec.Struct, frozen=True, array_like=True):
    """Blocks first to first + len(blocks) of the sequence in a slot, allocated for this step or later ones."""

    slot: int
    first: int
    blocks: list[int]


class KnownPiece(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that the CPU knows, from position start on, of the sequence in a slot.

    draws: which of its generated tokens is drawn after the last one, from 0; -1 where none is drawn.
    """

    slot: int
    start: int
    token_ids: list[int]
    draws: int


class StepInput(msgspec.Struct, frozen=True, kw_only=True):
    """One step: first a row for each decode, then the rows of each piece, of those that draw before the others'.

    decodes: slots of sequences whose last token was drawn on the device since they got the slot; token, position, cache
    slot and length are there. Rows that draw a token: the decodes, then the last rows of the pieces that draw. blocks:
    those that the device's block table lacks. new: to be applied before anything else. media: rows of the pieces.
    """

    step: int
    decodes: list[int]
    pieces: list[KnownPiece]
    blocks: list[NewBlocks]
    new: list[NewSequence]
    media: list[MediaSpan]


def pack(plan: Plan) -> StepInput:
    """What the ranks need of a plan; to be called right after `schedule`, before anything changes its sequences."""
    starts = {piece.sequence: piece.start for piece in plan.pieces}
    pieces, media, row = [], [], len(plan.decodes)
    for piece in sorted(plan.pieces, key=lambda piece: not piece.samples):
        pieces.append(_known_piece(piece))
        media.extend(_media_spans(piece, row))
        row += piece.length
    return StepInput(
        step=plan.step,
        decodes=[sequence.slot for sequence in plan.decodes],
        pieces=pieces,
        blocks=[NewBlocks(sequence.slot, first, blocks) for sequence, first, blocks in plan.blocks],
        new=[_new_sequence(sequence, starts[sequence]) for sequence in plan.admitted],
        media=media,
    )


def _known_piece(piece: Piece) -> KnownPiece:
    sequence, end = piece.sequence, piece.start + piece.length
    draws = end - sequence.num_prompt if piece.samples else -1
    return KnownPiece(sequence.slot, piece.start, sequence.tokens[piece.start : end], draws)


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
