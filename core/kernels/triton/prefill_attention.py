"""Attention of any sequences, whatever their rows, with a running softmax (Dao et al. 2023, arXiv 2307.08691)."""

from __future__ import annotations

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
from plexor.kernels.triton.ragged import find_owner, tile_rows


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """How the work is cut up.

    lanes: rows times heads of a program. positions: attended together. warps, stages: of a program. registers: of a
    thread at most, None for as many as it wants.
    """

    lanes: int
    positions: int
    warps: int
    stages: int
    registers: int | None = None


def prefill_tuning(lanes: int, size: int, dtype: torch.dtype) -> PrefillTuning:
    """lanes: rows times heads of the longest piece. size: features of a head, up to a power of two."""
    lanes = max(16, triton.next_power_of_2(lanes))
    if dtype == torch.float32:
        return PrefillTuning(16, 32, warps=8, stages=2)
    if lanes < 128:
        return PrefillTuning(lanes, 64 if size <= 128 else 32, warps=4, stages=3)
    if size <= 64:
        return PrefillTuning(128, 64, warps=8, stages=3)
    return PrefillTuning(128, 128 if size <= 128 else 32, warps=8, stages=2)


@triton.jit
def attend_span(
    best,
    mass,
    total,
    queries,
    scale,
    keys,
    values,
    key_scales,
    value_scales,
    blocks,
    begin,
    end,
    stop,
    own,
    window,
    entry_stride,
    scale_stride,
    POSITIONS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALED: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Go on with the positions from `begin` to `end`, both multiples of POSITIONS; below `stop` if MASKED.

    Without MASKED every lane sees all of them. keys, values: of one head. own: each lane's position. A tile's block ids
    are loaded one tile early.
    """
    SIZE: tl.constexpr = queries.shape[1]
    lane = tl.arange(0, POSITIONS)
    feature = tl.arange(0, SIZE)
    index, offset = place_in_blocks(begin, lane, POSITIONS, BLOCK_SIZE)
    next_block = tl.load(blocks + index, mask=begin + lane < stop, other=0)
    for start in range(begin, end, POSITIONS):
        position = start + lane
        block = next_block
        index, next_offset = place_in_blocks(start + POSITIONS, lane, POSITIONS, BLOCK_SIZE)
        next_block = tl.load(blocks + index, mask=position + POSITIONS < stop, other=0)
        slot = (block * BLOCK_SIZE + offset).to(tl.int64)
        entry = slot[:, None] * entry_stride + feature[None, :]
        offset = next_offset
        if MASKED:
            inside = (position < stop)[:, None] & (feature < HEAD_SIZE)[None, :]
            key = tl.load(keys + entry, mask=inside, other=0.0)
            value = tl.load(values + entry, mask=inside, other=0.0)
        elif HEAD_SIZE == SIZE:
            key = tl.load(keys + entry)
            value = tl.load(values + entry)
        else:
            key = tl.load(keys + entry, mask=(feature < HEAD_SIZE)[None, :], other=0.0)
            value = tl.load(values + entry, mask=(feature < HEAD_SIZE)[None, :], other=0.0)
        key = widened(key, False, COMPUTE)
        value = widened(value, True, COMPUTE)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
        if SCALED:
            there = position < stop
            key_scale = tl.load(key_scales + slot * scale_stride, mask=there, other=1.0)
            value_scale = tl.load(value_scales + slot * scale_stride, mask=there, other=1.0)
            value_scale = tl.where(value_scale < FAINTEST, FAINTEST, value_scale)
            scores = scores * key_scale[None, :] + tl.log2(value_scale)[None, :] / scale[:, None]
        if MASKED:
            visible = position[None, :] <= own[:, None]
            if WINDOWED:
                visible = visible & (position[None, :] > own[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale[:, None] - new_best[:, None])
        fade = tl.exp2(best - new_best)
        if SCALED:
            # A position that a lane does not see may have a scale of NaN.
            mass = mass * fade + tl.sum(tl.where(weights > 0.0, weights / value_scale[None, :], 0.0), axis=1)
        else:
            mass = mass * fade + tl.sum(weights, axis=1)
        total = tl.dot(weights.to(COMPUTE), value, total * fade[:, None], input_precision="ieee")
        best = new_best
    return best, mass, total


# What lies behind the decodes of a batch begins anywhere: compiled for each alignment, steps would wait for seconds.
@triton.jit(
    do_not_specialize=["num_rows", "num_sequences", "block_table_stride", "window"],
    do_not_specialize_on_alignment=["block_table", "row_end", "row_shift", "kv_length"],
)
def prefill_attention_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    block_table,
    row_end,
    row_shift,
    kv_length,
    out,
    num_rows,
    num_sequences,
    block_table_stride,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    entry_stride,
    scale_stride,
    scale_log2,
    window,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNIT: tl.constexpr,
    SCALED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """One program: TILE rows of a sequence times the GROUP query heads that share a KV head.

    Positions stand in tiles; only those tiles are masked that some row of the program does not see as a whole:

        row 0     |..xx|xxxx|x...|....|      x seen, with a window of 7
        row 1     |...x|xxxx|xx..|....|
        tiles      mask full mask none
    """
    # A sequence's last rows see the most positions: they come first, so that no long program starts at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = find_owner(row_end, num_sequences, tile, TILE)
    first, end = tile_rows(row_end, num_sequences, num_rows, sequence, tile, TILE)
    if first >= end:
        return
    lane = tl.arange(0, LANES)
    row = first + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    used = (lane < TILE * GROUP) & (row < end)
    if SHIFTED:
        row += tl.load(row_shift + sequence)
    feature = tl.arange(0, SIZE)
    stored = used[:, None] & (feature < HEAD_SIZE)[None, :]
    target = out + row.to(tl.int64)[:, None] * out_row_stride + head[:, None] * HEAD_SIZE + feature[None, :]
    if sequence == num_sequences:
        tl.store(target, tl.zeros((LANES, SIZE), dtype=out.dtype.element_ty), mask=stored)
        return
    source = q + row.to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + feature[None, :]
    queries, scale = load_queries(source, stored, scale_log2, COMPUTE, UNIT)
    # Positions of the first row, of each lane's, and the end of what the last row sees.
    least = tl.load(kv_length + sequence) - end + first
    own = least + lane // GROUP
    stop = least + tl.minimum(TILE, end - first)
    full_begin = stop * 0
    full_end = tl.maximum(least + 1, 0) // POSITIONS * POSITIONS
    keys += kv_head * HEAD_SIZE
    values += kv_head * HEAD_SIZE
    if SCALED:
        key_scales += kv_head
        value_scales += kv_head
    blocks = block_table + sequence.to(tl.int64) * block_table_stride
    best = tl.full((LANES,), LOWEST, dtype=tl.float32)
    mass = tl.zeros((LANES,), dtype=tl.float32)
    total = tl.zeros((LANES, SIZE), dtype=tl.float32)
    if WINDOWED:
        begin = tl.maximum(least - window + 1, 0) // POSITIONS * POSITIONS
        full_begin = tl.cdiv(tl.maximum(stop - window, 0), POSITIONS) * POSITIONS
        full_end = tl.maximum(full_begin, full_end)
        best, mass, total = attend_span(
            best,
            mass,
            total,
            queries,
            scale,
            keys,
            values,
            key_scales,
            value_scales,
            blocks,
            begin,
            full_begin,
            stop,
            own,
            window,
            entry_stride,
            scale_stride,
            POSITIONS,
            BLOCK_SIZE,
            HEAD_SIZE,
            COMPUTE,
            SCALED,
            WINDOWED,
            True,
        )
    best, mass, total = attend_span(
        best,
        mass,
        total,
        queries,
        scale,
        keys,
        values,
        key_scales,
        value_scales,
        blocks,
        full_begin,
        full_end,
        stop,
        own,
        window,
        entry_stride,
        scale_stride,
        POSITIONS,
        BLOCK_SIZE,
        HEAD_SIZE,
        COMPUTE,
        SCALED,
        WINDOWED,
        False,
    )
    best, mass, total = attend_span(
        best,
        mass,
        total,
        queries,
        scale,
        keys,
        values,
        key_scales,
        value_scales,
        blocks,
        full_end,
        stop,
        stop,
        own,
        window,
        entry_stride,
        scale_stride,
        POSITIONS,
        BLOCK_SIZE,
        HEAD_SIZE,
        COMPUTE,
        SCALED,
        WINDOWED,
        True,
    )
    average = total / tl.where(mass > 0.0, mass, 1.0)[:, None]
    tl.store(target, average.to(out.dtype.element_ty), mask=stored)


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Rows that are attended in one launch, the last positions of S sequences.

    num_rows: of all of them, and of padding, which becomes zeros. longest: rows of the longest. row_end [S] int32:
    where each one's rows end. row_shift [S] int32: how much further down in the batch a sequence's rows lie; None where
    all rows of the batch are meant. kv_length [S], block_table [S, B]: as in Pages.
    """

    num_rows: int
    longest: int
    row_end: Tensor
    row_shift: Tensor | None
    kv_length: Tensor
    block_table: Tensor


def prefill_attention(
    q: Tensor,
    cache: LayerCache,
    pieces: Pieces,
    scale: float,
    window: int | None,
    out: Tensor,
    tuning: PrefillTuning | None = None,
) -> None:
    """Attend the pieces' rows of q [T, N, D] into out; scale > 0, the cache's entries [K, D] are contiguous.

    A cache may have scales, as plexor.kernels.triton.decode_attention says.
    """
    num_heads, head_size = q.shape[1:]
    keys, values = cache["keys"], cache["values"]
    block_size, num_kv_heads = keys.shape[1:3]
    num_sequences = pieces.kv_length.shape[0]
    group = num_heads // num_kv_heads
    size = max(16, triton.next_power_of_2(head_size))
    key_scales, value_scales = cache.get("key_scales"), cache.get("value_scales")
    compute = compute_dtype(q, keys)
    if tuning is None:
        products = torch.float32 if compute == tl.float32 else q.dtype
        tuning = prefill_tuning(pieces.longest * group, size, products)
    lanes = max(tuning.lanes, triton.next_power_of_2(group))
    tile = lanes // group
    prefill_attention_kernel[(pieces.num_rows // tile + num_sequences + 1, num_kv_heads)](
        q,
        keys,
        values,
        key_scales,
        value_scales,
        pieces.block_table,
        pieces.row_end,
        pieces.row_shift,
        pieces.kv_length,
        out,
        pieces.num_rows,
        num_sequences,
        pieces.block_table.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        keys.stride(1),
        num_kv_heads,
        scale * LOG2_E,
        0 if window is None else window,
        GROUP=group,
        TILE=tile,
        LANES=lanes,
        POSITIONS=tuning.positions,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        SIZE=size,
        COMPUTE=compute,
        UNIT=compute == tl.float16 and q.dtype != torch.float16,
        SCALED=key_scales is not None,
        WINDOWED=window is not None,
        SHIFTED=pieces.row_shift is not None,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        maxnreg=tuning.registers,
    )
