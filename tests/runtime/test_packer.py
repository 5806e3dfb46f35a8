"""A plan becomes the lists that are written out by hand here."""

from __future__ import annotations

import msgspec
import numpy
import torch

from plexor.runtime.packer import KnownPiece, MediaSpan, NewBlocks, StepInput, pack
from plexor.runtime.request import Media, Request, SamplingParams
from plexor.runtime.scheduler import Piece, Plan, Scheduler, SchedulerConfig
from plexor.runtime.sequence import Sequence


def make_sequence(
    tokens: list[int], num_prompt: int, blocks: list[int], slot: int, media: tuple[Media, ...] = ()
) -> Sequence:
    request = Request("a", tuple(tokens[:num_prompt]), SamplingParams(top_k=3), (7,), media)
    sequence = Sequence(request, order=0, limit=10, seed=5)
    sequence.tokens += tokens[num_prompt:]
    sequence.blocks, sequence.slot = blocks, slot
    return sequence


def test_decodes_come_first_and_pieces_that_draw_next() -> None:
    prompt = make_sequence([17, 18, 3, 99, 42, 5], 6, blocks=[9, 2], slot=1)
    decode = make_sequence([1, 2, 3, 4], 3, blocks=[6, 5], slot=0)
    resumed = make_sequence([8, 7], 1, blocks=[3], slot=2)
    plan = Plan(
        step=4,
        decodes=(decode,),
        pieces=(Piece(prompt, 1, 4, False), Piece(resumed, 1, 1, True)),
        rows=(decode, resumed),
        blocks=((decode, 1, [5]), (resumed, 0, [3])),
    )
    assert pack(plan) == StepInput(
        step=4,
        decodes=[0],
        pieces=[KnownPiece(2, 1, [7], 1), KnownPiece(1, 1, [18, 3, 99, 42], -1)],
        blocks=[NewBlocks(0, 1, [5]), NewBlocks(2, 0, [3])],
        new=[],
        media=[],
    )


def test_a_resumed_sequence_brings_what_it_has_generated() -> None:
    sequence = make_sequence([1, 2, 3, 4, 5], 3, blocks=[0, 1], slot=2)
    (new,) = pack(Plan(0, (), (Piece(sequence, 0, 5, True),), admitted=(sequence,))).new
    assert (new.slot, new.request_id, new.prompt_ids, new.generated_ids) == (2, "a", [1, 2, 3], [4, 5])
    assert (new.sampling, new.seed, new.end_ids) == (SamplingParams(top_k=3), 5, (7,))


def test_media_follow_their_placeholders_through_chunks() -> None:
    pixels = torch.arange(6, dtype=torch.float32).reshape(1, 2, 3)
    media = (Media("image", 0, 2, b"one", pixels), Media("image", 3, 5, b"two", numpy.zeros(4, dtype=numpy.uint8)))
    other = make_sequence([1], 1, blocks=[7], slot=0)
    sequence = make_sequence(list(range(10)), 10, blocks=[0, 1, 2], slot=3, media=media)
    short = Piece(make_sequence([4, 5], 2, blocks=[8], slot=2), 0, 2, True)
    pieces = [Piece(sequence, 0, 5, False), Piece(sequence, 5, 5, True)]
    spans = [pack(Plan(0, (other,), (piece, short))).media for piece in pieces]
    assert spans[0] == [
        MediaSpan(slot=3, index=0, first=0, row=3, count=2),
        MediaSpan(slot=3, index=1, first=0, row=6, count=2),
    ]
    assert spans[1] == [MediaSpan(slot=3, index=1, first=2, row=1, count=3)]


def test_media_travel_as_bytes_and_cached_ones_stay_behind() -> None:
    pixels = torch.arange(6, dtype=torch.float32).reshape(1, 2, 3)
    media = (Media("image", 0, 4, b"one", pixels), Media("image", 5, 2, b"two", pixels.transpose(1, 2)))
    sequence = make_sequence(list(range(10)), 10, blocks=[0, 1, 2], slot=3, media=media)
    step = pack(Plan(0, (), (Piece(sequence, 4, 6, True),), admitted=(sequence,)))
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=StepInput)
    assert arrived == step
    ((second,),) = [new.media for new in arrived.new]
    assert (second.index, second.kind, second.length, second.digest) == (1, "image", 2, b"two")
    assert torch.equal(torch.from_numpy(second.array()), pixels.transpose(1, 2))


def test_a_scheduled_step_packs() -> None:
    config = SchedulerConfig(block_size=4, num_blocks=8, max_sequences=2, max_step_tokens=8, max_length=16)
    scheduler = Scheduler(config)
    scheduler.add(Request("a", (1, 2, 3), SamplingParams(seed=9), ()))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    slot = scheduler._running[0].slot
    assert pack(first).pieces == [KnownPiece(slot, 0, [1, 2, 3], 0)]
    assert (pack(second).decodes, pack(second).pieces) == ([slot], [])
