"""The multiply of a stack of layers with 2:4 weights in e4m3 over rows that are sorted by layer."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.reference.groups import by_group
from plexor_quant.kernels.reference.sparse24_fp8_linear import sparse24_fp8_linear


def sparse24_fp8_grouped_linear(x: Tensor, weight: Tensor, scale: Tensor, index: Tensor, group_end: Tensor) -> Tensor:
    """x [M, in], weight e4m3 [G, out, in / 2], scale float32 [G, out], index uint8 [G, out, ceil(in / 8)] -> [M, out].

    group_end: [G] int32. Each group's rows as in sparse24_fp8_linear; rows from group_end[-1] on come back as zeros.
    """

    def multiply(rows: Tensor, group: int) -> Tensor:
        return sparse24_fp8_linear(rows, weight[group], scale[group], index[group])

    return by_group(x, weight.shape[1], group_end, multiply)
