"""The multiply of a stack of linear layers: tiles of rows find their group on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.kernels.triton.ragged import find_owner, tile_rows


@triton.jit(do_not_specialize=["num_rows"])
def grouped_linear_kernel(
    x,
    weight,
    group_end,
    out,
    num_rows,
    num_groups,
    num_inputs,
    num_outputs,
    x_stride,
    weight_group_stride,
    weight_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    tile = tl.program_id(0)
    group = find_owner(group_end, num_groups, tile, ROWS)
    first, end = tile_rows(group_end, num_groups, num_rows, group, tile, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    feature = tl.arange(0, INPUTS)
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    if group < num_groups:
        left = x + row.to(tl.int64)[:, None] * x_stride + feature[None, :]
        right = weight + group.to(tl.int64) * weight_group_stride
        right += output.to(tl.int64)[None, :] * weight_stride + feature[:, None]
        for start in range(0, num_inputs, INPUTS):
            inside = start + feature < num_inputs
            rows = tl.load(left + start, mask=(row < end)[:, None] & inside[None, :], other=0.0)
            columns = tl.load(right + start, mask=inside[:, None] & (output < num_outputs)[None, :], other=0.0)
            total = tl.dot(rows, columns, total, input_precision="ieee")
    target = out + row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (output < num_outputs)[None, :])


def grouped_linear(x: Tensor, weight: Tensor, group_end: Tensor) -> Tensor:
    """As plexor.kernels.reference.grouped_linear; never waits for the device."""
    num_rows, num_inputs = x.shape
    num_groups, num_outputs = weight.shape[:2]
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    rows, outputs, inputs, num_warps = tile_sizes(num_rows / num_groups, x.element_size())
    grouped_linear_kernel[(num_rows // rows + num_groups + 1, triton.cdiv(num_outputs, outputs))](
        x,
        weight,
        group_end,
        out,
        num_rows,
        num_groups,
        num_inputs,
        num_outputs,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        ROWS=rows,
        OUTPUTS=outputs,
        INPUTS=inputs,
        num_warps=num_warps,
        num_stages=3,
    )
    return out


def tile_sizes(rows_each: float, element_size: int) -> tuple[int, int, int, int]:
    """(rows, outputs, inputs, warps) of a tile when a group has so many rows on average."""
    inputs = 128 // element_size
    if rows_each <= 16:
        return 16, 64, 2 * inputs, 4
    if rows_each <= 64:
        return 64, 64, inputs, 4
    return 128, 128, inputs, 8
