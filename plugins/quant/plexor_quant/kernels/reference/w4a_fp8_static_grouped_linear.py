"""The multiply of a stack of layers with 4-bit weights and activations that share one scale."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.reference.groups import by_group
from plexor_quant.kernels.reference.w4a_fp8_static_linear import w4a_fp8_static_linear


def w4a_fp8_static_grouped_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group_size: int,
    input_scale: float,
    group_end: Tensor,
    zero: Tensor | None = None,
) -> Tensor:
    """x [M, in], weight uint8 [G, out, ceil(in / 2)], scale bfloat16 [G, out, ceil(in / group_size)] -> [M, out].

    group_end: [G] int32; zero: uint8 [G, out, ceil(in / group_size)] or None. Each group's rows as in
    w4a_fp8_static_linear; rows from group_end[-1] on come back as zeros.
    """

    def multiply(rows: Tensor, group: int) -> Tensor:
        zeros = None if zero is None else zero[group]
        return w4a_fp8_static_linear(rows, weight[group], scale[group], group_size, input_scale, zeros)

    return by_group(x, weight.shape[1], group_end, multiply)
