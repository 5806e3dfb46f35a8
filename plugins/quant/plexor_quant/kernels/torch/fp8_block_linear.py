"""The multiply of a dense layer with e4m3 weights in blocks through a bfloat16 product."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.reference.fp8_block_linear import widen_blocks


def fp8_block_linear(x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, group_size: int) -> Tensor:
    """x bfloat16 [T, in], weight e4m3 [out, in], scale float32 [blocks, groups] -> bfloat16 [T, out].

    Activations stay as they are; widened weights are rounded to bfloat16.
    """
    return functional.linear(x, widen_blocks(weight, scale, block_rows, group_size).to(x.dtype))
