"""The multiply of a stack of layers with 2:4 weights on a CPU, some rows of the weights at a time."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.cpu.sparse24_linear import sparse24_linear
from plexor_quant.kernels.reference.groups import by_group


def sparse24_grouped_linear(x: Tensor, weight: Tensor, index: Tensor, group_end: Tensor) -> Tensor:
    """As plexor_quant.kernels.reference.sparse24_grouped_linear."""
    return by_group(
        x, weight.shape[1], group_end, lambda rows, group: sparse24_linear(rows, weight[group], index[group])
    )
