"""The multiply of a stack of layers with e4m3 weights in blocks: few rows from the codes, many through widened weights.

Each program has some output features of one layer, and goes through the rows of that layer; where it has none, it ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.api import launch_next, overlaps, wait
from plexor_quant.kernels.torch.fp8_block_grouped_linear import fp8_block_grouped_linear as by_widening
from plexor_quant.kernels.triton.fp8_block_linear import ANY, Tile, compute_dtype, multiply_tile

MAX_ROWS_PER_GROUP = 16
"""More rows share the cost of writing widened weights and reading them again. Chosen by bytes, not yet measured."""

FEW, MORE = Tile(32, 16, 4, 6), Tile(64, 32, 4, 5)


@triton.jit(do_not_specialize=ANY)
def multiply_grouped_kernel(
    x,
    weight,
    scale,
    y,
    group_end,
    num_outputs,
    num_inputs,
    stride,
    num_groups,
    block_rows,
    group_size,
    weight_size,
    scale_size,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    member = tl.program_id(1)
    start = tl.load(group_end + member - 1, mask=member > 0, other=0)
    end = tl.load(group_end + member)
    for first in range(start, end, ROWS):
        multiply_tile(
            x,
            weight + member.to(tl.int64) * weight_size,
            scale + member.to(tl.int64) * scale_size,
            y,
            first,
            end,
            num_outputs,
            num_inputs,
            stride,
            num_groups,
            block_rows,
            group_size,
            OUTPUTS,
            ROWS,
            COMPUTE,
        )


def fp8_block_grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, group_size: int, group_end: Tensor
) -> Tensor:
    """As plexor_quant.kernels.reference.fp8_block_grouped_linear but for the rounding of x, which is bfloat16."""
    if x.shape[0] > MAX_ROWS_PER_GROUP * weight.shape[0]:
        return by_widening(x, weight, scale, block_rows, group_size, group_end)
    return multiply(x, weight, scale, block_rows, group_size, group_end)


def multiply(x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, group_size: int, group_end: Tensor) -> Tensor:
    """The product from the codes, for any number of rows."""
    x = x if x.stride(1) == 1 else x.contiguous()
    num_members, num_outputs, num_inputs = weight.shape
    y = torch.zeros(x.shape[0], num_outputs, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        pdl = overlaps(x.device)
        tile = FEW if x.shape[0] <= FEW.rows * num_members // 2 else MORE
        multiply_grouped_kernel[(triton.cdiv(num_outputs, tile.outputs), num_members)](
            x,
            weight,
            scale,
            y,
            group_end,
            num_outputs,
            num_inputs,
            x.stride(0),
            scale.shape[2],
            block_rows,
            group_size,
            num_outputs * num_inputs,
            scale.shape[1] * scale.shape[2],
            OUTPUTS=tile.outputs,
            ROWS=tile.rows,
            COMPUTE=compute_dtype(x),
            PDL=pdl,
            launch_pdl=pdl,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y
