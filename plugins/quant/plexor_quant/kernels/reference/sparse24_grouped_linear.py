"""The multiply of a stack of layers with 2:4 weights over rows that are sorted by layer."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.reference.groups import by_group
from plexor_quant.kernels.reference.sparse24_linear import sparse24_linear


def sparse24_grouped_linear(x: Tensor, weight: Tensor, index: Tensor, group_end: Tensor) -> Tensor:
    """x [M, in], weight [G, out, in / 2], index uint8 [G, out, ceil(in / 8)], group_end [G] int32 -> [M, out].

    Each group's rows as in sparse24_linear; rows from group_end[-1] on come back as zeros.
    """
    return by_group(
        x, weight.shape[1], group_end, lambda rows, group: sparse24_linear(rows, weight[group], index[group])
    )
