"""Which group each row belongs to, found on the device so that the host never waits."""

from __future__ import annotations

import torch
from torch import Tensor


def group_of_row(num_rows: int, group_end: Tensor) -> Tensor:
    """group_end [G] int32 -> [num_rows] int64; G for rows beyond the last group."""
    rows = torch.arange(num_rows, dtype=group_end.dtype, device=group_end.device)
    return torch.searchsorted(group_end, rows, right=True)


def without_strays(products: Tensor, group_end: Tensor) -> Tensor:
    """products [M, out] with zeros in the rows of no group, which torch's grouped products leave unwritten."""
    rows = torch.arange(products.shape[0], dtype=group_end.dtype, device=group_end.device)
    return torch.where((rows < group_end[-1]).unsqueeze(-1), products, 0)
