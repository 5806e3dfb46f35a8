"""The multiply of a stack of layers with 4-bit weights on a CPU, some rows of the weights at a time."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.cpu.int4_wo_linear import int4_wo_linear
from plexor_quant.kernels.reference.groups import by_group


def int4_wo_grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor, group_size: int, group_end: Tensor, zero: Tensor | None = None
) -> Tensor:
    """As plexor_quant.kernels.reference.int4_wo_grouped_linear."""

    def multiply(rows: Tensor, group: int) -> Tensor:
        return int4_wo_linear(rows, weight[group], scale[group], group_size, None if zero is None else zero[group])

    return by_group(x, weight.shape[1], group_end, multiply)
