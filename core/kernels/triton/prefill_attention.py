"""Attention of any sequences, whatever their rows, with a running softmax (Dao et al. 2022, arXiv 2205.14135)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from plexor.batch import LayerCache, Pages
from plexor.kernels.triton.decode_attention import LOG2_E, compute_dtype
from plexor.kernels.triton.ragged import find_owner, tile_rows


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "block_table_stride"])
def prefill_attention_kernel(
    q,
    keys,
    values,
    block_table,
    query_end,
    kv_length,
    out,
    num_rows,
    num_sequences,
    block_table_stride,
    block_size,
    head_size,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    entry_stride,
    scale_log2,
    window,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    HEADS_AND_ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """One program: TILE rows of a sequence times the GROUP query heads that share a KV head."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = find_owner(query_end, num_sequences, tile, TILE)
    first, end = tile_rows(query_end, num_sequences, num_rows, sequence, tile, TILE)
    if first >= end:
        return
    lane = tl.arange(0, HEADS_AND_ROWS)
    row = first + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    used = (lane < TILE * GROUP) & (row < end)
    feature = tl.arange(0, SIZE)
    present = feature < head_size
    target = out + row.to(tl.int64)[:, None] * out_row_stride + head[:, None] * head_size + feature[None, :]
    stored = used[:, None] & present[None, :]
    if sequence == num_sequences:
        tl.store(target, tl.zeros((HEADS_AND_ROWS, SIZE), dtype=out.dtype.element_ty), mask=stored)
        return
    length = tl.load(kv_length + sequence)
    own = length - end + row
    source = q + row.to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + feature[None, :]
    queries = tl.load(source, mask=stored, other=0.0).to(COMPUTE)
    best = tl.full((HEADS_AND_ROWS,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((HEADS_AND_ROWS,), dtype=tl.float32)
    total = tl.zeros((HEADS_AND_ROWS, SIZE), dtype=tl.float32)
    stop = length - end + tl.minimum(first + TILE, end)
    begin = stop * 0
    if WINDOWED:
        begin = tl.maximum(length - end + first - window + 1, 0) // POSITIONS * POSITIONS
    for start in range(begin, stop, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        exists = position < stop
        block = tl.load(block_table + sequence.to(tl.int64) * block_table_stride + position // block_size, exists, 0)
        entry = (block.to(tl.int64) * block_size + position % block_size) * entry_stride + kv_head * head_size
        inside = exists[:, None] & present[None, :]
        key = tl.load(keys + entry[:, None] + feature[None, :], mask=inside, other=0.0).to(COMPUTE)
        visible = exists[None, :] & (position[None, :] <= own[:, None])
        if WINDOWED:
            visible = visible & (position[None, :] > own[:, None] - window)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # A row that has seen nothing yet keeps a best of -inf, which must not be subtracted from itself.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(best - base)
        value = tl.load(values + entry[:, None] + feature[None, :], mask=inside, other=0.0).to(COMPUTE)
        mass = mass * fade + tl.sum(weights, axis=1)
        total = tl.dot(weights.to(COMPUTE), value, total * fade[:, None], input_precision="ieee")
        best = new_best
    average = total / tl.where(mass > 0.0, mass, 1.0)[:, None]
    tl.store(target, average.to(out.dtype.element_ty), mask=stored)


def prefill_attention(
    q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None, out: Tensor
) -> None:
    """As plexor.kernels.reference.paged_attention, into out [T, N, D]; the cache's entries [K, D] are contiguous."""
    num_rows, num_heads, head_size = q.shape
    keys, values = cache["keys"], cache["values"]
    block_size, num_kv_heads = keys.shape[1:3]
    num_sequences = pages.kv_length.shape[0]
    group = num_heads // num_kv_heads
    size = max(16, triton.next_power_of_2(head_size))
    heads_and_rows = max(16 if pages.max_query == 1 else 128 // q.element_size(), triton.next_power_of_2(group))
    tile = heads_and_rows // group if pages.max_query > 1 else 1
    prefill_attention_kernel[(num_rows // tile + num_sequences + 1, num_kv_heads)](
        q,
        keys,
        values,
        pages.block_table,
        pages.query_start[1:],
        pages.kv_length,
        out,
        num_rows,
        num_sequences,
        pages.block_table.stride(0),
        block_size,
        head_size,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        keys.stride(1),
        scale * LOG2_E,
        0 if window is None else window,
        GROUP=group,
        TILE=tile,
        HEADS_AND_ROWS=heads_and_rows,
        POSITIONS=64 if size * q.element_size() <= 256 else 32,
        SIZE=size,
        COMPUTE=compute_dtype(q.dtype, keys.dtype),
        WINDOWED=window is not None,
        num_warps=4,
        num_stages=2,
    )
