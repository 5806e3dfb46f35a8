"""Plain rounding of rows to e4m3 and int8, with one float32 scale for each row.

A row is an output channel of a weight or a token of the activations. Its scale puts the largest magnitude on the
largest number of the grid, so nothing is clipped. Rows of zeros get the smallest normal scale and stay zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

E4M3_MAX = 448.0
INT8_MAX = 127.0
# Keeps the division of an all-zero row, and of one whose scale would underflow, away from 0 / 0.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def row_scale(x: Tensor, largest: float) -> Tensor:
    """x [..., n] -> float32 [..., 1]: each row's largest magnitude over `largest`."""
    return (x.abs().amax(dim=-1, keepdim=True).float() / largest).clamp_min(SMALLEST_SCALE)


def to_e4m3(x: Tensor) -> Tensor:
    """x as float8_e4m3fn, nearest with ties to even; beyond +-448, where torch would give NaN, the largest number."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] -> e4m3 [..., n], scale float32 [..., 1]; x is about their product."""
    scale = row_scale(x, E4M3_MAX)
    return to_e4m3(x.float() / scale), scale


def round_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] -> int8 [..., n] in -127 to 127, scale float32 [..., 1]; x is about their product."""
    scale = row_scale(x, INT8_MAX)
    return (x.float() / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def fix_e4m3(x: Tensor, scale: float) -> Tensor:
    """x [..., n] -> e4m3 [..., n], x over one scale; infinity and all beyond its range become its largest number."""
    return to_e4m3(x.float() / scale)


def fix_int8(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x [..., n] -> int8 [..., n] from -128 to 127, x over one scale, and that scale float32 [..., 1].

    Integers have no NaN: the scale of a row that is not finite is NaN instead.
    """
    numbers = (x.float() / scale).round().clamp(-INT8_MAX - 1, INT8_MAX).nan_to_num()
    return numbers.to(torch.int8), x.abs().amax(dim=-1, keepdim=True).float() * 0 + scale


def round_groups_e4m3(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """x [T, n] -> e4m3 [T, n], scale float32 [T, ceil(n / group_size)]; each group of a row is about their product."""
    size = x.shape[-1]
    grouped = functional.pad(x, (0, -size % group_size)).unflatten(-1, (-1, group_size))
    codes, scale = round_e4m3(grouped)
    return codes.flatten(-2)[..., :size], scale.squeeze(-1)
