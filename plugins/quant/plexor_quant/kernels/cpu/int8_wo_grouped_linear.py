"""The multiply of a stack of layers with int8 weights on a CPU, some rows of the weights at a time."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.cpu.int8_wo_linear import int8_wo_linear
from plexor_quant.kernels.reference.groups import by_group


def int8_wo_grouped_linear(x: Tensor, weight: Tensor, scale: Tensor, group_end: Tensor) -> Tensor:
    """As plexor_quant.kernels.reference.int8_wo_grouped_linear."""
    return by_group(
        x, weight.shape[1], group_end, lambda rows, group: int8_wo_linear(rows, weight[group], scale[group])
    )
