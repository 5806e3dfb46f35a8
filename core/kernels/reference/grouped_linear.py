"""The multiply of a stack of linear layers over rows that are sorted by layer."""

from __future__ import annotations

from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, group_end: Tensor) -> Tensor:
    """Multiply x [M, in], weight [G, out, in], group_end [G] int32 -> [M, out].

    Group g owns the rows from group_end[g - 1] (0 for the first) to group_end[g], possibly none. Rows from
    group_end[-1] on belong to no group and come back as zeros.
    """
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for group, end in enumerate(group_end.tolist()):
        if end > start:
            out[start:end] = x[start:end] @ weight[group].T
        start = end
    return out
