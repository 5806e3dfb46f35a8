"""Rows that are sorted by group, each group multiplied by its own weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def by_group(x: Tensor, out_features: int, group_end: Tensor, multiply: Callable[[Tensor, int], Tensor]) -> Tensor:
    """x [M, in], group_end [G] int32 -> [M, out]; multiply: (a group's rows, group) -> their products.

    Group g owns the rows from group_end[g - 1] (0 for the first) to group_end[g]. Rows of no group come back as zeros.
    """
    out = x.new_zeros(x.shape[0], out_features)
    start = 0
    for group, end in enumerate(group_end.tolist()):
        if end > start:
            out[start:end] = multiply(x[start:end], group)
        start = end
    return out
