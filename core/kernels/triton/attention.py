"""What the kernels of attention share: how they read queries and entries, and what they compute in."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
# What a row that has seen nothing has for its best score: finite, so that it can be subtracted from itself.
LOWEST = tl.constexpr(-1e30)
# 2^-100: a value with a smaller scale is one of zeros.
FAINTEST = tl.constexpr(7.888609052210118e-31)


@triton.jit
def place_in_blocks(start, lane, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Which block of its sequence position start + lane lies in, and where in it; start is a multiple of TILE."""
    if TILE % BLOCK_SIZE == 0:
        return start // BLOCK_SIZE + lane // BLOCK_SIZE, lane % BLOCK_SIZE
    return (start + lane) // BLOCK_SIZE, (start + lane) % BLOCK_SIZE


@triton.jit
def widen(entries, IN_ROWS: tl.constexpr):
    """float8_e4m3fn to float16, four at a time.

    IN_ROWS: as they lie in memory; a product over rows would otherwise pick them from columns byte by byte.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }""",
        "=r,=r,r",
        [entries],
        dtype=tl.float16,
        is_pure=not IN_ROWS,
        pack=4,
    )


@triton.jit
def widen_integers(entries, IN_ROWS: tl.constexpr):
    """int8 to float16 as `widen`: 0x6400 is 1024 in float16, which counts in ones there."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 shifted, zero;
        xor.b32 shifted, $2, 0x80808080;
        mov.b32 zero, 0x64806480;
        prmt.b32 $0, shifted, 0x64646464, 0x4140;
        prmt.b32 $1, shifted, 0x64646464, 0x4342;
        sub.f16x2 $0, $0, zero;
        sub.f16x2 $1, $1, zero;
        }""",
        "=&r,=&r,r",
        [entries],
        dtype=tl.float16,
        is_pure=not IN_ROWS,
        pack=4,
    )


@triton.jit
def widened(entries, IN_ROWS: tl.constexpr, COMPUTE: tl.constexpr):
    """Entries [positions, features] in COMPUTE, which holds each of them."""
    if entries.dtype == COMPUTE or COMPUTE == tl.float32:  # noqa: SIM300 - constants are spelled in capitals
        wide = entries.to(COMPUTE)
    elif entries.dtype == tl.int8:
        wide = widen_integers(entries, IN_ROWS)
    else:
        wide = widen(entries, IN_ROWS)
    return wide


@triton.jit
def load_queries(source, mask, scale, COMPUTE: tl.constexpr, UNIT: tl.constexpr):
    """Queries [lanes, size] in COMPUTE, and for each lane what its scores are still to be multiplied by.

    UNIT: float16 is exact for the stored entries, but its range may be too small for queries: bring them below one.
    """
    # Past the L1, which waiting for the previous kernel does not clear.
    queries = tl.load(source, mask=mask, other=0.0, cache_modifier=".cg")
    scales = tl.full((queries.shape[0],), 1.0, dtype=tl.float32) * scale
    if UNIT:
        wide = queries.to(tl.float32)
        peak = tl.max(tl.abs(wide), axis=1)
        peak = tl.where(peak > 0.0, peak, 1.0)
        queries = wide / peak[:, None]
        scales *= peak
    return queries.to(COMPUTE), scales


def compute_dtype(q: Tensor, keys: Tensor) -> Any:
    """What the products are made of: the 16-bit dtype that holds each stored value, float32 where there is none.

    Triton's interpreter has no assembly, which widens integers.
    """
    dtype, storage = q.dtype, keys.dtype
    exact = (dtype, torch.float8_e4m3fn, torch.int8) if q.device.type == "cuda" else (dtype, torch.float8_e4m3fn)
    if dtype == torch.float32 or storage not in exact:
        return tl.float32
    return tl.bfloat16 if storage == torch.bfloat16 else tl.float16
