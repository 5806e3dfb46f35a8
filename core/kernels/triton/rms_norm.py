"""Root mean square normalisation: one program holds whole rows in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.kernels.triton.pdl import launch_next, overlaps, wait


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x,
    weight,
    out,
    num_rows,
    num_inner,
    hidden,
    outer_stride,
    inner_stride,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (feature < hidden)[None, :]
    source = (row // num_inner).to(tl.int64) * outer_stride + (row % num_inner).to(tl.int64) * inner_stride
    launch_next(PDL)
    wait(PDL)
    gain = tl.load(weight + feature, mask=feature < hidden, other=0.0).to(tl.float32)
    wide = tl.load(x + source[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1) / hidden
    rounded = (wide * tl.rsqrt(mean_square + eps)[:, None]).to(x.dtype.element_ty).to(tl.float32)
    target = row.to(tl.int64) * hidden
    tl.store(out + target[:, None] + feature[None, :], (rounded * gain[None, :]).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As plexor.kernels.reference.rms_norm."""
    hidden = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x.reshape(-1, 1, hidden)
    num_rows = rows.shape[0] * rows.shape[1]
    width = triton.next_power_of_2(hidden)
    rows_each = max(1, 512 // width)
    pdl = overlaps(x.device)
    rms_norm_kernel[(triton.cdiv(num_rows, rows_each),)](
        rows,
        weight,
        out,
        num_rows,
        rows.shape[1],
        hidden,
        rows.stride(0),
        rows.stride(1),
        eps,
        ROWS=rows_each,
        WIDTH=width,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=min(16, max(2, width // 512)),
    )
    return out
