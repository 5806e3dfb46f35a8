"""Grids of numbers with a scale for each row or group, and the roundings that look at one weight alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Grid:
    """Numbers from -largest to largest times a scale: all that codes, a dtype, can hold there.

    group_size: consecutive input features that share a scale, None for a whole row; the last group may be shorter.
    """

    largest: float
    scale_dtype: torch.dtype
    group_size: int | None = None
    codes: torch.dtype = torch.int8

    def scale(self, magnitude: Tensor) -> Tensor:
        """The scale, as it is stored, that puts this magnitude on the largest number."""
        smallest = torch.finfo(self.scale_dtype).tiny
        return (magnitude.float() / self.largest).to(self.scale_dtype).clamp_min(smallest)

    def round(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest numbers, as float32: what the stored scale times them comes closest to weight."""
        numbers = (weight / scale.float()).clamp(-self.largest, self.largest)
        return numbers.to(self.codes).float() if self.codes.is_floating_point else numbers.round()

    def groups(self, in_features: int) -> list[slice]:
        """The columns of each group."""
        size = self.group_size or in_features
        return [slice(start, min(start + size, in_features)) for start in range(0, in_features, size)]


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """numbers [out, in] and scale [out, groups] in the grid's dtypes."""

    numbers: Tensor
    scale: Tensor
    grid: Grid

    def dense(self) -> Tensor:
        """float32 [out, in], exactly what numbers and scales mean."""
        in_features = self.numbers.shape[1]
        size = self.grid.group_size or in_features
        return self.numbers.float() * self.scale.float().repeat_interleave(size, dim=1)[:, :in_features]


Rounding = Callable[[Tensor, Tensor, Grid], Rounded]
"""(weight [out, in], gram [in, in] float32: the sum of x xᵀ over inputs x, grid) -> the weight on the grid."""


def nearest(weight: Tensor, gram: Tensor, grid: Grid) -> Rounded:
    """Each weight to the nearest number, the largest magnitude of a group met; the gram is not looked at."""
    return round_groups(weight, grid, 1.0)


def round_groups(weight: Tensor, grid: Grid, ratio: float) -> Rounded:
    """As nearest, with every scale for `ratio` of its group's largest magnitude: what lies beyond is clipped."""
    weight = weight.float()
    out_features, in_features = weight.shape
    size = grid.group_size or in_features
    num = -(-in_features // size)
    grouped = functional.pad(weight, (0, num * size - in_features)).view(out_features, num, size)
    scale = grid.scale(ratio * grouped.abs().amax(dim=-1))
    numbers = grid.round(grouped, scale.unsqueeze(-1)).flatten(1)[:, :in_features]
    return Rounded(numbers.to(grid.codes), scale, grid)
