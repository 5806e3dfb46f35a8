"""GPTQ (Frantar et al., 2022, arXiv 2210.17323): column by column, each error made up for by the columns after it.

The inverse of the gram is held by its upper Cholesky factor U. After column j has been rounded, the best change of the
columns after it is minus the error over U[j, j], times U[j, j + 1:]; the output's error grows by (error / U[j, j])².
Columns keep their order, so groups stay consecutive. Where scales belong to groups, a group is carried through with
several scales for each row, clipped by the ratios of the clip search, and the row keeps the one with the least growth.
One scale for a whole row is that of the clip search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plexor.api import CheckpointError
from plexor_quant.calibration.clip import RATIOS, clipped
from plexor_quant.calibration.grid import Grid, Rounded

DAMPING = 0.01
"""Of the gram's mean diagonal, added to its diagonal: few inputs make it singular."""

BLOCK = 128
"""Columns whose errors reach the columns behind them in one product, where no group says how many."""


def gptq(weight: Tensor, gram: Tensor, grid: Grid) -> Rounded:
    """A Rounding: the least error of the output that one pass over the columns finds."""
    left = weight.float().clone()
    in_features = left.shape[1]
    factor = _inverse_factor(gram)
    numbers = torch.empty_like(left, dtype=grid.codes)
    # A row's one scale is met by every block, so it is chosen before the first; a group's when its columns come.
    row = clipped(left, gram, grid).scale if grid.group_size is None else None
    scales = []
    size = grid.group_size or BLOCK
    for start in range(0, in_features, size):
        stop = min(start + size, in_features)
        inner = factor[start:stop, start:stop]
        if row is None:
            found, scale, error = _best_block(left[:, start:stop], inner, grid)
            scales.append(scale)
        else:
            found, error = _round_block(left[:, start:stop], row, inner, grid)
        numbers[:, start:stop] = found.to(grid.codes)
        left[:, stop:] -= error @ factor[start:stop, stop:]
    return Rounded(numbers, torch.cat(scales, dim=1) if row is None else row, grid)


def _best_block(block: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [out, n], scale [out, 1] and errors [out, n] of a group, by the ratio that is best for each row."""
    rows, tries = len(block), len(RATIOS)
    ratios = torch.tensor(RATIOS, device=block.device).view(tries, 1, 1)
    scales = grid.scale(ratios * block.abs().amax(dim=1, keepdim=True))
    numbers, errors = _round_block(block.repeat(tries, 1), scales.flatten(0, 1), factor, grid)
    # Of equal ones argmin may take any; the weights then mean the same to the output.
    best = errors.square().sum(dim=1).view(tries, rows).argmin(dim=0)
    chosen = best * rows + torch.arange(rows, device=block.device)
    return numbers[chosen], scales.flatten(0, 1)[chosen], errors[chosen]


def _round_block(block: Tensor, scale: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Numbers [out, n] and errors over the factor's diagonal [out, n], errors spread within the block."""
    left = block.clone()
    numbers, errors = torch.empty_like(left), torch.empty_like(left)
    widened = scale.float().squeeze(1)
    for column in range(left.shape[1]):
        value = left[:, column]
        found = grid.round(value, widened)
        error = (value - found * widened) / factor[column, column]
        left[:, column + 1 :] -= error.unsqueeze(1) * factor[column, column + 1 :]
        numbers[:, column], errors[:, column] = found, error
    return numbers, errors


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped gram's inverse, float32.

    Features that no input had get a diagonal of their own, so that they are rounded to the nearest. The damping grows
    tenfold until the factorisation succeeds. CheckpointError for a gram that is not finite.
    """
    if not gram.isfinite().all():
        raise CheckpointError("the inputs of a linear layer are not finite on this text: calibrate in float32")
    damped = gram.double()
    diagonal = damped.diagonal()
    exact, damping = diagonal.clone(), DAMPING
    mean = exact.mean().clamp_min(torch.finfo(torch.float32).tiny)
    while True:
        diagonal.copy_(exact + damping * mean)
        upper = _factor_of_inverse(damped)
        if upper is not None:
            return upper.float()
        damping *= 10


def _factor_of_inverse(matrix: Tensor) -> Tensor | None:
    """Upper, in the matrix' dtype; None where a factorisation fails. At most two more of its size at a time."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper: Tensor
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed else upper
