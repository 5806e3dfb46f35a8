"""The multiply of a stack of layers with int8 weights and activations that share one scale."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.reference.groups import by_group
from plexor_quant.kernels.reference.int8_static_linear import int8_static_linear


def int8_static_grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: float, group_end: Tensor
) -> Tensor:
    """x [M, in], weight int8 [G, out, in], scale float32 [G, out], group_end [G] int32 -> [M, out] in x's dtype.

    Each group's rows as in int8_static_linear; rows from group_end[-1] on come back as zeros.
    """

    def multiply(rows: Tensor, group: int) -> Tensor:
        return int8_static_linear(rows, weight[group], scale[group], input_scale)

    return by_group(x, weight.shape[1], group_end, multiply)
