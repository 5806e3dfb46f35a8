"""A norm, the linear layer behind it and its gate: one launch for few rows, three for more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from plexor.kernels.triton.pdl import launch_next, wait
from plexor.kernels.triton.rms_norm import rms_norm
from plexor.kernels.triton.silu_mul import silu_mul
from plexor.kernels.triton.stream_linear import first_tiles, in_pairs, options, products, takes, tile_for


@triton.jit
def norm_gated_linear_kernel(
    x,
    gain,
    weight,
    bias,
    out,
    size,
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
    """A program owns the same features of the gate and of what it lets through: weight rows i and size + i."""
    first = tl.program_id(0) * (OUTPUTS // 2)
    place = tl.arange(0, OUTPUTS)
    output = tl.minimum(first + place // 2, size - 1) + place % 2 * size
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
    gate, up = in_pairs(y)
    own = first + tl.arange(0, OUTPUTS // 2)
    row = tl.arange(0, PADDED)
    target = out + row.to(tl.int64)[None, :] * size + own[:, None]
    opened = gate * tl.sigmoid(gate) * up
    tl.store(target, opened.to(out.dtype.element_ty), mask=(own < size)[:, None] & (row < ROWS)[None, :])


def norm_gated_linear(
    x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
) -> Tensor:
    """As plexor.kernels.reference.norm_gated_linear, with rows whose last axis is contiguous."""
    weight = stored["weight"]
    if not takes(x, weight):
        return silu_mul(functional.linear(rms_norm(x, gain, eps), weight, bias))
    size = weight.shape[0] // 2
    out = torch.empty(x.shape[0], size, dtype=x.dtype, device=x.device)
    tile = tile_for(weight.shape[1], x.shape[0])
    norm_gated_linear_kernel[(triton.cdiv(size, tile.outputs // 2),)](
        x, gain, weight, bias, out, size, x.stride(0), weight.stride(0), eps, **options(x, tile)
    )
    return out
