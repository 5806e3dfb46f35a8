"""The multiply of a stack of layers with int8 weights over rows that are sorted by layer."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.reference.groups import by_group
from plexor_quant.kernels.reference.int8_wo_linear import int8_wo_linear


def int8_wo_grouped_linear(x: Tensor, weight: Tensor, scale: Tensor, group_end: Tensor) -> Tensor:
    """x [M, in], weight int8 [G, out, in], scale float32 [G, out], group_end [G] int32 -> [M, out] in x's dtype.

    Each group's rows as in int8_wo_linear; rows from group_end[-1] on come back as zeros.
    """
    return by_group(
        x, weight.shape[1], group_end, lambda rows, group: int8_wo_linear(rows, weight[group], scale[group])
    )
