"""Attention of one-row sequences, their positions cut into equal shares (flash-decoding, Dao et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.triton.attention import (
    FAINTEST,
    LOG2_E,
    LOWEST,
    compute_dtype,
    load_queries,
    place_in_blocks,
    widened,
)
from plexor.kernels.triton.pdl import launch_next, overlaps, wait

# Up to here the products around attention stream their weights, and leave room for its programs.
FEW_ROWS = 16
# Numbers of partial results that a thread holds while it adds them up.
COMBINED = 32


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How the work is cut up.

    tile: positions attended together. warps, stages: of a program. registers: of a thread at most. programs: how many
    there are at most, for each multiprocessor. least: positions that a program takes at least, in whole tiles. most:
    programs that share a sequence at most.
    """

    tile: int
    warps: int
    stages: int
    registers: int
    programs: int
    least: int
    most: int


def decode_tuning(num_rows: int, size: int, element_bytes: int) -> DecodeTuning:
    """Measured on an H200 among the products of a layer: bench/NOTES.md.

    size: features of a head, up to a power of two. element_bytes: of a stored number. Few rows are a matter of latency:
    one tile each for many programs, in so little memory that they start beside the product before them. With many rows
    four programs on each multiprocessor keep the memory busy.
    """
    if num_rows <= FEW_ROWS:
        tile = max(16, min(64, (16 << 10) // (size * max(2, element_bytes))))
        return DecodeTuning(tile, warps=2, stages=1, registers=255, programs=4, least=tile, most=64)
    tile = max(16, min(64, (8 << 10) // (size * element_bytes)))
    return DecodeTuning(tile, warps=4, stages=3, registers=128, programs=4, least=128, most=32)


@triton.jit
def first_tile(length, window, TILE: tl.constexpr, WINDOWED: tl.constexpr):
    """The tile with the first position that the last of `length` sees."""
    if WINDOWED:
        return tl.maximum(length - window, 0) // TILE
    return length * 0


@triton.jit
def attend(
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    blocks,
    begin,
    stop,
    lowest,
    scale,
    entry_stride,
    scale_stride,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Best score, mass and weighted sum of queries over the positions from `begin`, below `stop`, not below `lowest`.

    keys, values: of one head. blocks: the sequence's row of the block table; a tile's ids are loaded one tile early.
    begin: a multiple of TILE. With scales of the entries, that of a value is part of its weight, and the best score is
    of the two together, so that weights stay below one.
    """
    HEADS: tl.constexpr = queries.shape[0]
    SIZE: tl.constexpr = queries.shape[1]
    lane = tl.arange(0, TILE)
    feature = tl.arange(0, SIZE)
    best = tl.full((HEADS,), LOWEST, dtype=tl.float32)
    # Each lane keeps a mass of its own until the end: a sum over lanes is a barrier between warps.
    masses = tl.zeros((HEADS, TILE), dtype=tl.float32)
    total = tl.zeros((HEADS, SIZE), dtype=tl.float32)
    index, offset = place_in_blocks(begin, lane, TILE, BLOCK_SIZE)
    next_block = tl.load(blocks + index, mask=begin + lane < stop, other=0)
    for start in range(begin, stop, TILE):
        block = next_block
        index, next_offset = place_in_blocks(start + TILE, lane, TILE, BLOCK_SIZE)
        next_block = tl.load(blocks + index, mask=start + TILE + lane < stop, other=0)
        slot = (block * BLOCK_SIZE + offset).to(tl.int64)
        entry = slot * entry_stride
        offset = next_offset
        seen = (start + lane < stop) & (start + lane >= lowest)
        inside = seen[:, None] & (feature < HEAD_SIZE)[None, :]
        key = tl.load(keys + entry[:, None] + feature[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        key = widened(key, False, COMPUTE)
        value = tl.load(values + entry[:, None] + feature[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        value = widened(value, True, COMPUTE)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale[:, None]
        if SCALED:
            key_scale = tl.load(key_scales + slot * scale_stride, mask=seen, other=0.0, cache_modifier=".cg")
            value_scale = tl.load(value_scales + slot * scale_stride, mask=seen, other=1.0, cache_modifier=".cg")
            value_scale = tl.where(value_scale < FAINTEST, FAINTEST, value_scale)
            scores = scores * key_scale[None, :] + tl.log2(value_scale)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        fade = tl.exp2(best - new_best)
        masses = masses * fade[:, None] + (weights / value_scale[None, :] if SCALED else weights)
        total = tl.dot(weights.to(COMPUTE), value, total * fade[:, None], input_precision="ieee")
        best = new_best
    return best, tl.sum(masses, axis=1), total


@triton.jit
def part_slot(part, first):
    """Where a sequence's parts lie: the first worker's in its tail slot, those of the next in their head slots."""
    return tl.where(part == 0, first * 2 + 1, (first + part) * 2)


@triton.jit
def combine(
    parts,
    marks,
    first,
    num_parts,
    mark_stride,
    stride,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The average [HEADS, SIZE] of one KV head over the parts that as many workers left, the first in its tail slot.

    parts, marks: of this KV head. stride: slots apart in marks; times SIZE in parts. mark_stride: from best to mass.
    """
    head = tl.arange(0, HEADS)
    feature = tl.arange(0, SIZE)
    every = tl.arange(0, MOST)
    there = (every < num_parts)[:, None] & (head < GROUP)[None, :]
    mark = marks + part_slot(every, first)[:, None] * stride + head[None, :]
    bests = tl.load(mark, mask=there, other=LOWEST, cache_modifier=".cg")
    masses = tl.load(mark + mark_stride, mask=there, other=0.0, cache_modifier=".cg")
    best = tl.max(bests, axis=0)
    mass = tl.sum(masses * tl.exp2(bests - best[None, :]), axis=0)
    total = tl.zeros((CHUNK, HEADS, SIZE), dtype=tl.float32)
    for start in range(0, num_parts, CHUNK):
        part = start + tl.arange(0, CHUNK)
        present = (part < num_parts)[:, None] & (head < GROUP)[None, :]
        place = part_slot(part, first)[:, None] * stride + head[None, :]
        part_best = tl.load(marks + place, mask=present, other=LOWEST, cache_modifier=".cg")
        places = place[:, :, None] * SIZE + feature[None, None, :]
        sums = tl.load(parts + places, mask=present[:, :, None], other=0.0, cache_modifier=".cg")
        total += sums * tl.exp2(part_best - best[None, :])[:, :, None]
    return tl.sum(total, axis=0) / tl.where(mass > 0.0, mass, 1.0)[:, None]


@triton.jit(do_not_specialize=["num_rows", "block_table_stride", "window", "least"])
def decode_attention_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    block_table,
    kv_length,
    out,
    parts,
    marks,
    arrivals,
    num_rows,
    block_table_stride,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    entry_stride,
    scale_stride,
    scale_log2,
    window,
    least,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PART_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNIT: tl.constexpr,
    SCALED: tl.constexpr,
    WINDOWED: tl.constexpr,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: a KV head's share of all sequences' tiles, which stand in a row; GROUP query heads read each.

        tiles     |aaaaaaa|b|ccccccc|d|      total 16, six workers, share 3
        workers   |0  |1  |2  |3  |4  |5

    A sequence that one worker has whole (d) is written at once. Of one that is cut (a, c), each worker leaves its part:
    in its tail slot where the sequence goes on after it, otherwise in its head slot. The last to arrive adds them up.
    """
    launch_next(PDL)
    kv_head = tl.program_id(0)
    worker = tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    num_workers = tl.num_programs(1)
    index = tl.arange(0, ROWS)
    lengths = tl.load(kv_length + index, mask=index < num_rows, other=0)
    # An empty sequence has a tile as well, in which nothing is seen: its row becomes zeros.
    tiles = tl.maximum(tl.cdiv(lengths, TILE) - first_tile(lengths, window, TILE, WINDOWED), 1)
    tiles = tl.where(index < num_rows, tiles, 0)
    ends = tl.cumsum(tiles, axis=0)
    num_tiles = tl.sum(tiles, axis=0)
    share = tl.maximum(tl.cdiv(num_tiles, num_workers), tl.maximum(tl.cdiv(tl.max(tiles, axis=0), MOST - 1), least))
    tile = tl.minimum(worker * share, num_tiles)
    last = tl.minimum(tile + share, num_tiles)
    if tl.cdiv(num_rows, num_workers) * tl.max(tiles, axis=0) * 8 <= share * 9:
        # Whole sequences are shared out nearly as evenly, and nothing has to be added up: they go where they begin.
        tile = tl.min(tl.where(ends - tiles >= tile, ends - tiles, num_tiles), axis=0)
        last = tl.min(tl.where(ends - tiles >= last, ends - tiles, num_tiles), axis=0)
    head = tl.arange(0, HEADS)
    feature = tl.arange(0, SIZE)
    stored = (head < GROUP)[:, None] & (feature < HEAD_SIZE)[None, :]
    stride = num_kv_heads * GROUP
    mark_stride = num_workers * 2 * stride
    if SCALED:
        key_scales += kv_head
        value_scales += kv_head
    parts += kv_head * GROUP * SIZE
    marks += kv_head * GROUP
    wait(PDL)
    while tile < last:
        row = tl.sum((ends <= tile).to(tl.int32), axis=0)
        row_start = tl.max(tl.where(ends <= tile, ends, 0), axis=0)
        row_end = tl.min(tl.where(ends > tile, ends, num_tiles), axis=0)
        end = tl.minimum(last, row_end)
        length = tl.sum(tl.where(index == row, lengths, 0), axis=0)
        skipped = first_tile(length, window, TILE, WINDOWED)
        source = q + row.to(tl.int64) * q_row_stride + (kv_head * GROUP + head)[:, None] * q_head_stride
        queries, scale = load_queries(source + feature[None, :], stored, scale_log2, COMPUTE, UNIT)
        lowest = length - window if WINDOWED else length * 0
        best, mass, total = attend(
            queries,
            keys + kv_head * HEAD_SIZE,
            values + kv_head * HEAD_SIZE,
            key_scales,
            value_scales,
            block_table + row.to(tl.int64) * block_table_stride,
            (skipped + tile - row_start) * TILE,
            tl.minimum((skipped + end - row_start) * TILE, length),
            lowest,
            scale,
            entry_stride,
            scale_stride,
            TILE,
            BLOCK_SIZE,
            HEAD_SIZE,
            COMPUTE,
            SCALED,
        )
        target = out + row.to(tl.int64) * out_row_stride + kv_head * GROUP * HEAD_SIZE
        if (tile == row_start) & (end == row_end):
            whole = total / tl.where(mass > 0.0, mass, 1.0)[:, None]
            place = head[:, None] * HEAD_SIZE + feature[None, :]
            tl.store(target + place, whole.to(out.dtype.element_ty), mask=stored)
        else:
            slot = worker * 2 + (end < row_end).to(tl.int32) * (tile == row_start).to(tl.int32)
            mark = marks + slot * stride + head
            tl.store(mark, best, mask=head < GROUP)
            tl.store(mark + mark_stride, mass, mask=head < GROUP)
            place = (slot * stride + head)[:, None] * SIZE + feature[None, :]
            tl.store(parts + place, total, mask=(head < GROUP)[:, None])
            # All of the program's stores come before its arrival, and its loads after everybody's.
            tl.debug_barrier()
            first = row_start // share
            num_parts = (row_end - 1) // share - first + 1
            arrival = arrivals + first * num_kv_heads + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == num_parts - 1:
                tl.store(arrival, 0)
                average = combine(
                    parts, marks, first, num_parts, mark_stride, stride, GROUP, PART_HEADS, SIZE, MOST, CHUNK
                )
                part_head = tl.arange(0, PART_HEADS)
                within = (part_head < GROUP)[:, None] & (feature < HEAD_SIZE)[None, :]
                places = target + part_head[:, None] * HEAD_SIZE + feature[None, :]
                tl.store(places, average.to(out.dtype.element_ty), mask=within)
        tile = end


class DecodeAttention:
    """The attention of one-row sequences for one layer: keeps the counters by which its programs find each other."""

    def __init__(self, tuning: Callable[[int, int, int], DecodeTuning] = decode_tuning) -> None:
        self._tuning = tuning
        self._arrivals: Tensor | None = None

    def __call__(
        self,
        q: Tensor,
        cache: LayerCache,
        block_table: Tensor,
        kv_length: Tensor,
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """Attend q [S, N, D], row s the last of kv_length[s] positions, into out [S, N, D]; no positions give zeros.

        A cache may have "key_scales", "value_scales" [num_blocks, block_size, K], float32 and contiguous, by which the
        numbers of each position and head are multiplied.
        What it launches depends on shapes alone, so that it can be captured and replayed with other lengths.
        """
        num_rows, num_heads, head_size = q.shape
        keys, values = cache["keys"], cache["values"]
        key_scales, value_scales = cache.get("key_scales"), cache.get("value_scales")
        block_size, num_kv_heads = keys.shape[1:3]
        group = num_heads // num_kv_heads
        size = max(16, triton.next_power_of_2(head_size))
        tuning = self._tuning(num_rows, size, keys.element_size())
        num_programs = max(tuning.programs * num_multiprocessors(q.device), num_kv_heads)
        most_tiles = num_rows * triton.cdiv(block_table.shape[1] * block_size, tuning.tile)
        least = triton.cdiv(tuning.least, tuning.tile)
        num_workers = min(num_programs // num_kv_heads, triton.cdiv(most_tiles, least))
        part_heads = triton.next_power_of_2(group)
        marks = torch.empty((2, num_workers * 2, num_heads), dtype=torch.float32, device=q.device)
        parts = torch.empty((num_workers * 2, num_heads, size), dtype=torch.float32, device=q.device)
        compute = compute_dtype(q, keys)
        pdl = overlaps(q.device)
        decode_attention_kernel[(num_kv_heads, num_workers)](
            q,
            keys,
            values,
            key_scales,
            value_scales,
            block_table,
            kv_length,
            out,
            parts,
            marks,
            self._counters(num_programs, q.device),
            num_rows,
            block_table.stride(0),
            q.stride(0),
            q.stride(1),
            out.stride(0),
            keys.stride(1),
            num_kv_heads,
            scale * LOG2_E,
            0 if window is None else window,
            least,
            ROWS=padded(num_rows),
            GROUP=group,
            TILE=tuning.tile,
            BLOCK_SIZE=block_size,
            HEAD_SIZE=head_size,
            HEADS=max(16, part_heads),
            PART_HEADS=part_heads,
            SIZE=size,
            COMPUTE=compute,
            UNIT=compute == tl.float16 and q.dtype != torch.float16,
            SCALED=key_scales is not None,
            WINDOWED=window is not None,
            MOST=tuning.most,
            CHUNK=min(tuning.most, max(1, COMBINED * 32 * tuning.warps // (part_heads * size))),
            PDL=pdl,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            maxnreg=tuning.registers,
            launch_pdl=pdl,
        )

    def _counters(self, num_programs: int, device: torch.device) -> Tensor:
        """Zeros, to which each launch brings them back."""
        if self._arrivals is not None:
            return self._arrivals
        arrivals = torch.zeros(num_programs, dtype=torch.int32, device=device)
        # What is allocated while a graph is captured is zeroed when the graph runs, not before the next call.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self._arrivals = arrivals
        return arrivals


def padded(num_rows: int) -> int:
    """Rows that a program looks at: few different numbers, because the kernel is compiled for each."""
    return next(size for size in (16 << 2 * step for step in range(16)) if size >= num_rows)


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few where Triton's interpreter runs the programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
