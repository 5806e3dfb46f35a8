"""Read what a decode step needs of its sequences' state, and move the state on: one program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.kernels.triton.pdl import launch_next, overlaps, wait

WIDTH = 4096


@triton.jit
def advance_kernel(
    slots,
    tokens,
    lengths,
    steps,
    block_table,
    row_table,
    token_ids,
    positions,
    cache_slots,
    kv_length,
    drawn,
    block_size,
    block_stride,
    row_stride,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    used = slot >= 0
    position = tl.load(lengths + slot, mask=used, other=0)
    step = tl.load(steps + slot, mask=used, other=0)
    token = tl.load(tokens + slot, mask=used, other=0)
    source = block_table + slot * block_stride
    block = tl.load(source + position // block_size, mask=used, other=0)
    entry = block.to(tl.int64) * block_size + position % block_size
    tl.store(token_ids + row, token)
    tl.store(positions + row, position.to(tl.int64))
    tl.store(cache_slots + row, tl.where(used, entry, -1))
    tl.store(kv_length + row, tl.where(used, position + 1, 0))
    tl.store(drawn + row, step)
    tl.store(lengths + slot, position + 1, mask=used)
    tl.store(steps + slot, step + 1, mask=used)
    num_blocks = tl.where(used, position // block_size + 1, 0)
    for start in range(0, num_blocks, WIDTH):
        place = start + tl.arange(0, WIDTH)
        inside = place < num_blocks
        blocks = tl.load(source + place, mask=inside, other=0)
        tl.store(row_table + row * row_stride + place, blocks, mask=inside)


def advance(
    slots: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    steps: Tensor,
    block_table: Tensor,
    row_table: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As plexor.kernels.reference.advance; block_table and row_table have contiguous rows."""
    num_rows = slots.shape[0]
    token_ids, positions, cache_slots, drawn = (torch.empty_like(slots) for _ in range(4))
    kv_length = torch.empty(num_rows, dtype=torch.int32, device=slots.device)
    if num_rows == 0:
        return token_ids, positions, cache_slots, kv_length, drawn
    early = overlaps(slots.device)
    advance_kernel[(num_rows,)](
        slots,
        tokens,
        lengths,
        steps,
        block_table,
        row_table,
        token_ids,
        positions,
        cache_slots,
        kv_length,
        drawn,
        block_size,
        block_table.stride(0),
        row_table.stride(0),
        WIDTH=min(WIDTH, triton.next_power_of_2(block_table.shape[1])),
        PDL=early,
        num_warps=8,
        launch_pdl=early,
    )
    return token_ids, positions, cache_slots, kv_length, drawn
