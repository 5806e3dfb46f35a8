"""The clip search of AWQ (Lin et al., 2023, arXiv 2306.00978): smaller scales where these lower the output's error."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor_quant.calibration.grid import Grid, Rounded, round_groups

RATIOS = tuple(1.0 - 0.05 * step for step in range(11))
"""Of a group's largest magnitude that are tried, 1 first: of equals the first wins."""


def clipped(weight: Tensor, gram: Tensor, grid: Grid) -> Rounded:
    """A Rounding: each group takes the ratio with the least error (w - q)ᵀ G (w - q), G its own block of the gram."""
    weight = weight.float()
    best, least = round_groups(weight, grid, RATIOS[0]), None
    for ratio in RATIOS:
        tried = round_groups(weight, grid, ratio)
        error = _group_errors(weight - tried.dense(), gram, grid)
        if least is None:
            least = error
            continue
        better = error < least
        least = torch.where(better, error, least)
        wide = better.repeat_interleave(grid.group_size or weight.shape[1], dim=1)[:, : weight.shape[1]]
        numbers = torch.where(wide, tried.numbers.float(), best.numbers.float()).to(grid.codes)
        best = Rounded(numbers, torch.where(better, tried.scale, best.scale), grid)
    return best


def _group_errors(difference: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """[out, groups]: what each group alone adds to the squared error of the output."""
    errors = []
    for columns in grid.groups(difference.shape[1]):
        part = difference[:, columns]
        errors.append(((part @ gram[columns, columns]) * part).sum(dim=1))
    return torch.stack(errors, dim=1)
