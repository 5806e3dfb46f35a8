"""The gate of a gated feed-forward layer in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.kernels.triton.pdl import launch_next, overlaps, wait

WIDTH = 1024


@triton.jit
def silu_mul_kernel(x, out, size, row_stride, WIDTH: tl.constexpr, PDL: tl.constexpr):
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = feature < size
    gate = tl.load(x + row * row_stride + feature, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * row_stride + size + feature, mask=inside, other=0.0).to(tl.float32)
    opened = (gate * tl.sigmoid(gate)).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + feature, (opened * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(x: Tensor) -> Tensor:
    """As plexor.kernels.reference.silu_mul."""
    num_rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if num_rows:
        pdl = overlaps(x.device)
        silu_mul_kernel[(num_rows, triton.cdiv(size, WIDTH))](
            x, out, size, x.stride(0), WIDTH=WIDTH, PDL=pdl, launch_pdl=pdl
        )
    return out
