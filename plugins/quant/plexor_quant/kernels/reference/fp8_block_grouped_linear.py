"""The multiply of a stack of layers with e4m3 weights in blocks, over rows that are sorted by layer."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.reference.fp8_block_linear import fp8_block_linear
from plexor_quant.kernels.reference.groups import by_group


def fp8_block_grouped_linear(
    x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, group_size: int, group_end: Tensor
) -> Tensor:
    """x [M, in], weight e4m3 [G, out, in], scale float32 [G, blocks, groups], group_end [G] int32 -> [M, out].

    Each group's rows as in fp8_block_linear; rows from group_end[-1] on come back as zeros.
    """

    def multiply(rows: Tensor, group: int) -> Tensor:
        return fp8_block_linear(rows, weight[group], scale[group], block_rows, group_size)

    return by_group(x, weight.shape[1], group_end, multiply)
