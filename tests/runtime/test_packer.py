"""A plan becomes the lists that are written out by hand here."""

from __future__ import annotations

import msgspec
import numpy
import torch

from plexor.runtime.packer import MediaSpan, StepInput, pack
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


def test_prompt_pieces_and_decodes_lie_side_by_side() -> None:
    prompt = make_sequence([17, 18, 3, 99, 42, 5], 6, blocks=[9, 2], slot=1)
    decode = make_sequence([1, 2, 3, 4], 3, blocks=[6, 5], slot=0)
    known = make_sequence([8, 7], 1, blocks=[3], slot=2)
    plan = Plan(4, (Piece(prompt, 1, 4, False), Piece(decode, 4, 1, True, 2), Piece(known, 1, 1, True)))
    step = pack(plan, block_size=4)
    assert step == StepInput(
        step=4,
        token_ids=[18, 3, 99, 42, 0, 7],
        previous_rows=[-1, -1, -1, -1, 2, -1],
        positions=[1, 2, 3, 4, 4, 1],
        slots=[37, 38, 39, 8, 20, 13],
        query_start=[0, 4, 5, 6],
        kv_length=[5, 5, 2],
        block_table=[[9, 2], [6, 5], [3]],
        logit_rows=[4, 5],
        row_slots=[0, 2],
        row_steps=[2, 1],
        new=[],
        media=[],
    )


def test_a_block_table_ends_where_the_piece_ends() -> None:
    sequence = make_sequence(list(range(12)), 12, blocks=[4, 5, 6], slot=0)
    assert pack(Plan(0, (Piece(sequence, 0, 5, False),)), block_size=4).block_table == [[4, 5]]


def test_a_resumed_sequence_brings_what_it_has_generated() -> None:
    sequence = make_sequence([1, 2, 3, 4, 5], 3, blocks=[0, 1], slot=2)
    (new,) = pack(Plan(0, (Piece(sequence, 0, 5, True),), admitted=(sequence,)), block_size=4).new
    assert (new.slot, new.request_id, new.prompt_ids, new.generated_ids) == (2, "a", [1, 2, 3], [4, 5])
    assert (new.sampling, new.seed, new.end_ids) == (SamplingParams(top_k=3), 5, (7,))


def test_media_follow_their_placeholders_through_chunks() -> None:
    pixels = torch.arange(6, dtype=torch.float32).reshape(1, 2, 3)
    media = (Media("image", 0, 2, b"one", pixels), Media("image", 3, 5, b"two", numpy.zeros(4, dtype=numpy.uint8)))
    other = make_sequence([1], 1, blocks=[7], slot=0)
    sequence = make_sequence(list(range(10)), 10, blocks=[0, 1, 2], slot=3, media=media)
    pieces = [Piece(sequence, 0, 5, False), Piece(sequence, 5, 5, True)]
    spans = [pack(Plan(0, (Piece(other, 0, 1, True), piece)), block_size=4).media for piece in pieces]
    assert spans[0] == [
        MediaSpan(slot=3, index=0, first=0, row=1, count=2),
        MediaSpan(slot=3, index=1, first=0, row=4, count=2),
    ]
    assert spans[1] == [MediaSpan(slot=3, index=1, first=2, row=1, count=3)]


def test_media_travel_as_bytes_and_cached_ones_stay_behind() -> None:
    pixels = torch.arange(6, dtype=torch.float32).reshape(1, 2, 3)
    media = (Media("image", 0, 4, b"one", pixels), Media("image", 5, 2, b"two", pixels.transpose(1, 2)))
    sequence = make_sequence(list(range(10)), 10, blocks=[0, 1, 2], slot=3, media=media)
    step = pack(Plan(0, (Piece(sequence, 4, 6, True),), admitted=(sequence,)), block_size=4)
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
    step = pack(second, block_size=4)
    assert (step.token_ids, step.previous_rows, step.positions, step.row_steps) == ([0], [0], [3], [1])
