"""A linear layer added to the residual, in the epilogue of the product whatever its size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.kernels.triton.pdl import launch_next, wait
from plexor.kernels.triton.stream_linear import first_tiles, options, products, takes, tile_for


@triton.jit
def linear_add_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    num_outputs,
    x_stride,
    weight_stride,
    residual_stride,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PAIRS: tl.constexpr,
    COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    own = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    output = tl.minimum(own, num_outputs - 1)
    row = tl.arange(0, PADDED).to(tl.int64)
    inside = (own < num_outputs)[:, None] & (row < ROWS)[None, :]
    tiles = first_tiles(weight, weight_stride, output, NUM_PAIRS, PAIRS)
    launch_next(PDL)
    wait(PDL)
    before = tl.load(residual + row[None, :] * residual_stride + own[:, None], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        before += tl.load(bias + output).to(tl.float32)[:, None]
    y = products(
        tiles,
        weight,
        weight_stride,
        output,
        x,
        x_stride,
        None,
        0.0,
        ROWS,
        NUM_PAIRS,
        OUTPUTS,
        PAIRS,
        COMPILED,
    )
    tl.store(out + row[None, :] * num_outputs + own[:, None], (before + y).to(out.dtype.element_ty), mask=inside)


def linear_add(x: Tensor, stored: Mapping[str, Tensor], residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """As plexor.kernels.reference.linear_add, with rows whose last axis is contiguous."""
    weight = stored["weight"]
    if not takes(x, weight):
        # In place of the residual: the library adds to what it finds, and would copy it first.
        return (residual if bias is None else residual + bias).addmm_(x, weight.t())
    num_outputs, num_inputs = weight.shape
    out = torch.empty(x.shape[0], num_outputs, dtype=x.dtype, device=x.device)
    tile = tile_for(num_inputs, x.shape[0])
    linear_add_kernel[(triton.cdiv(num_outputs, tile.outputs),)](
        x,
        weight,
        bias,
        residual,
        out,
        num_outputs,
        x.stride(0),
        weight.stride(0),
        residual.stride(0),
        **options(x, tile),
    )
    return out
