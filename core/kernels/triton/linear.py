"""The multiply of a dense linear layer: the weight streams by for few rows, the library multiplies more."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from plexor.kernels.triton.pdl import launch_next, wait
from plexor.kernels.triton.stream_linear import first_tiles, options, products, takes, tile_for


@triton.jit
def linear_kernel(
    x,
    gain,
    weight,
    bias,
    out,
    num_outputs,
    x_stride,
    weight_stride,
    eps,
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
    tiles = first_tiles(weight, weight_stride, output, NUM_PAIRS, PAIRS)
    launch_next(PDL)
    wait(PDL)
    y = products(
        tiles,
        weight,
        weight_stride,
        output,
        x,
        x_stride,
        gain,
        eps,
        ROWS,
        NUM_PAIRS,
        OUTPUTS,
        PAIRS,
        COMPILED,
    )
    if bias is not None:
        y += tl.load(bias + output).to(tl.float32)[:, None]
    row = tl.arange(0, PADDED)
    target = out + row.to(tl.int64)[None, :] * num_outputs + own[:, None]
    tl.store(target, y.to(out.dtype.element_ty), mask=(own < num_outputs)[:, None] & (row < ROWS)[None, :])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As plexor.kernels.reference.linear, with rows of x and of the weight whose last axis is contiguous."""
    return stream(x, None, 0.0, weight, None) if takes(x, weight) else functional.linear(x, weight)


def stream(x: Tensor, gain: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """At most MAX_ROWS rows, normed where there is a gain, times the weight -> [T, out]."""
    num_outputs, num_inputs = weight.shape
    out = torch.empty(x.shape[0], num_outputs, dtype=x.dtype, device=x.device)
    tile = tile_for(num_inputs, x.shape[0])
    linear_kernel[(triton.cdiv(num_outputs, tile.outputs),)](
        x, gain, weight, bias, out, num_outputs, x.stride(0), weight.stride(0), eps, **options(x, tile)
    )
    return out
