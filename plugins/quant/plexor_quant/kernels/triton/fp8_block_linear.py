"""The multiply of a dense layer with e4m3 weights in blocks: few rows from the codes, many through a widened weight.

    rows of x    what is done
    1 to 256     each program widens tiles of codes in registers, multiplies, and scales the sums of each group once
    more         the weight is widened in one pass, and the library multiplies

Activations stay as they are in both, which is more exact than the op asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from plexor.api import Facts, launch_next, overlaps, wait

MAX_ROWS = 256
"""More rows share the cost of writing the widened weight and reading it again. Chosen by bytes, not yet measured."""

TILE_INPUTS = tl.constexpr(128)
"""Input features that a program multiplies at a time: a group holds whole ones of these."""

WIDE_ROWS = tl.constexpr(32)
WIDE_INPUTS = tl.constexpr(256)


@dataclass(frozen=True, slots=True)
class Tile:
    """Output features and rows of x of a program's tile, its warps, and how many tiles of codes are under way."""

    outputs: int
    rows: int
    num_warps: int
    num_stages: int


TILES: tuple[Tile, ...] = (Tile(16, 16, 2, 8), Tile(64, 32, 4, 5), Tile(64, 64, 4, 4), Tile(128, 128, 8, 3))
"""The first that holds all rows serves them; the last any number."""


@triton.jit
def multiply_tile(
    x,
    weight,
    scale,
    y,
    first,
    end,
    num_outputs,
    num_inputs,
    stride,
    num_groups,
    block_rows,
    group_size,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Rows of x from `first` on, not beyond `end`, times this program's output features of a weight."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = first + tl.arange(0, ROWS)
    feature = tl.arange(0, TILE_INPUTS)
    is_output, is_row = output < num_outputs, row < end
    codes = weight + output.to(tl.int64)[:, None] * num_inputs + feature[None, :]
    inputs = x + row.to(tl.int64)[None, :] * stride + feature[:, None]
    scales = scale + (output // block_rows) * num_groups
    sums = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for start in range(0, num_inputs, TILE_INPUTS):
        inside = start + feature < num_inputs
        tile = tl.load(codes + start, mask=is_output[:, None] & inside[None, :], other=0.0)
        part = tl.load(inputs + start, mask=inside[:, None] & is_row[None, :], other=0.0)
        factor = tl.load(scales + start // group_size, mask=is_output, other=0.0)
        sums += tl.dot(tile.to(COMPUTE), part.to(COMPUTE)) * factor[:, None]
    places = y + row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    tl.store(places, tl.trans(sums).to(y.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


# What differs between layers and steps, and makes no faster code when it is known.
ANY = ("num_rows", "num_groups", "block_rows")


@triton.jit(do_not_specialize=ANY)
def multiply_kernel(
    x,
    weight,
    scale,
    y,
    num_rows,
    num_outputs,
    num_inputs,
    stride,
    num_groups,
    block_rows,
    group_size,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    multiply_tile(
        x,
        weight,
        scale,
        y,
        tl.program_id(1) * ROWS,
        num_rows,
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


@triton.jit
def widen_kernel(weight, scale, wide, num_outputs, num_inputs, num_groups, block_rows, group_size):
    output = tl.program_id(0) * WIDE_ROWS + tl.arange(0, WIDE_ROWS)
    feature = tl.program_id(1) * WIDE_INPUTS + tl.arange(0, WIDE_INPUTS)
    inside = (output < num_outputs)[:, None] & (feature < num_inputs)[None, :]
    place = output.to(tl.int64)[:, None] * num_inputs + feature[None, :]
    factor = tl.load(
        scale + (output // block_rows)[:, None] * num_groups + (feature // group_size)[None, :], mask=inside, other=0.0
    )
    code = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(wide + place, (code * factor).to(wide.dtype.element_ty), mask=inside)


def fp8_block_linear(x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, group_size: int) -> Tensor:
    """As plexor_quant.kernels.reference.fp8_block_linear but for the rounding of x, which is bfloat16 or float16."""
    if x.shape[0] > MAX_ROWS:
        return functional.linear(x, widened(weight, scale, block_rows, group_size, x.dtype))
    tile = next((tile for tile in TILES if x.shape[0] <= tile.rows), TILES[-1])
    return multiply(x, weight, scale, block_rows, group_size, tile)


def multiply(x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, group_size: int, tile: Tile) -> Tensor:
    """The product from the codes, for any number of rows."""
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, num_outputs = x.shape[0], weight.shape[0]
    y = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    if num_rows:
        pdl = overlaps(x.device)
        multiply_kernel[(triton.cdiv(num_outputs, tile.outputs), triton.cdiv(num_rows, tile.rows))](
            x,
            weight,
            scale,
            y,
            num_rows,
            num_outputs,
            x.shape[1],
            x.stride(0),
            scale.shape[1],
            block_rows,
            group_size,
            OUTPUTS=tile.outputs,
            ROWS=tile.rows,
            COMPUTE=compute_dtype(x),
            PDL=pdl,
            launch_pdl=pdl,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


def compute_dtype(x: Tensor) -> tl.dtype:
    """What the tensor cores multiply; Triton's interpreter has no products of bfloat16."""
    if not x.is_cuda:
        return tl.float32
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16


def widened(weight: Tensor, scale: Tensor, block_rows: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """What the codes mean, [out, in], rounded to `dtype`."""
    num_outputs, num_inputs = weight.shape
    wide = torch.empty(num_outputs, num_inputs, dtype=dtype, device=weight.device)
    grid = triton.cdiv(num_outputs, WIDE_ROWS.value), triton.cdiv(num_inputs, WIDE_INPUTS.value)
    widen_kernel[grid](weight, scale, wide, num_outputs, num_inputs, scale.shape[1], block_rows, group_size)
    return wide


def refuses(facts: Facts) -> str | None:
    """Groups that a tile of inputs would part, and rows of codes that start at no multiple of 16 bytes."""
    group_size, in_features = facts.shape.get("group_size", 0), facts.shape.get("in_features", 0)
    if group_size % TILE_INPUTS.value:
        return f"needs groups of a multiple of {TILE_INPUTS.value} input features, not {group_size}"
    return f"needs in_features in multiples of 16, not {in_features}" if in_features % 16 else None
