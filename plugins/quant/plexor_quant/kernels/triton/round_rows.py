"""Round rows to e4m3 or int8 with a scale for each: rows as they are, or normed. One program holds a whole row.

They give the very numbers of plexor_quant.rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.api import launch_next, overlaps, wait
from plexor_quant.rounding import E4M3_MAX, INT8_MAX, SMALLEST_SCALE

LARGEST = {torch.float8_e4m3fn: E4M3_MAX, torch.int8: INT8_MAX}
"""Of the dtypes that codes may have."""

_NUMBERS, _FEW_NUMBERS = 32, 8
"""That a thread holds: all loads of a row are under way at once, and few rows, which leave room, are done sooner."""

_FEW_ROWS = 256


@triton.jit
def store_codes(x, codes, scale, row, feature, inside, size, largest, smallest, INTEGER: tl.constexpr):
    """Round float32 numbers x of a row, zeros outside of it, and store codes and scale."""
    row_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=0), largest), smallest)
    tl.store(scale + row, row_scale)
    code = tl.clamp(tl.div_rn(x, row_scale), -largest, largest)
    if INTEGER:
        # Beside 1.5 * 2^23 the spacing of float32 is 1: the sum is rounded to the nearest integer, ties to even.
        code = (code + 12582912.0) - 12582912.0
    tl.store(codes + row * size + feature, code.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def round_rows_kernel(
    x,
    gain,
    codes,
    scale,
    size,
    stride,
    eps,
    largest,
    smallest,
    WIDTH: tl.constexpr,
    INTEGER: tl.constexpr,
    PDL: tl.constexpr,
):
    feature = tl.arange(0, WIDTH)
    inside = feature < size
    if gain is not None:
        gains = tl.load(gain + feature, mask=inside, other=0.0).to(tl.float32)
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    wide = tl.load(x + row * stride + feature, mask=inside, other=0.0).to(tl.float32)
    if gain is not None:
        mean_square = tl.sum(wide * wide, axis=0) / size
        rounded = (wide * tl.rsqrt(mean_square + eps)).to(x.dtype.element_ty).to(tl.float32)
        wide = (rounded * gains).to(x.dtype.element_ty).to(tl.float32)
    store_codes(wide, codes, scale, row, feature, inside, size, largest, smallest, INTEGER)


def round_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [T, n] -> codes [T, n] in e4m3 or int8, scale float32 [T, 1]."""
    return _round(x, None, 0.0, dtype)


def round_normed(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `round_rows` of the root mean square norm of x with gain [n], rounded to x's dtype."""
    return _round(x, gain, eps, dtype)


def _round(x: Tensor, gain: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, size = _adjacent(x), x.shape[1]
    codes, scale = _results(x, size, dtype)
    if x.shape[0]:
        round_rows_kernel[(x.shape[0],)](
            x, gain, codes, scale, size, x.stride(0), eps, LARGEST[dtype], SMALLEST_SCALE, **_options(x, size, dtype)
        )
    return codes, scale


def _adjacent(x: Tensor) -> Tensor:
    """x [T, n] with features one after the other."""
    return x if x.stride(1) == 1 else x.contiguous()


def _results(x: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape[0], size, dtype=dtype, device=x.device)
    return codes, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def _options(x: Tensor, size: int, dtype: torch.dtype) -> dict[str, int | bool]:
    width, pdl = triton.next_power_of_2(size), overlaps(x.device)
    numbers = _FEW_NUMBERS if x.shape[0] <= _FEW_ROWS else _NUMBERS
    warps = min(16, max(4, width // (32 * numbers)))
    return {"WIDTH": width, "INTEGER": dtype == torch.int8, "PDL": pdl, "launch_pdl": pdl, "num_warps": warps}
