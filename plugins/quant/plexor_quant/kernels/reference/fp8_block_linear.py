"""The multiply of a dense layer with e4m3 weights in blocks and e4m3 activations in groups."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.packing import spread
from plexor_quant.rounding import round_groups_e4m3


def fp8_block_linear(x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, group_size: int) -> Tensor:
    """x [T, in], weight e4m3 [out, in], scale float32 [ceil(out / block_rows), ceil(in / group_size)] -> [T, out].

    Each group of group_size features of a row of x is rounded to e4m3 with its own scale; scaled products are summed in
    float32. The result is in x's dtype. Providers may leave the activations as they are, which is more exact.
    """
    codes, input_scale = round_groups_e4m3(x, group_size)
    rounded = codes.float() * spread(input_scale, x.shape[1], group_size)
    return (rounded @ widen_blocks(weight, scale, block_rows, group_size).T).to(x.dtype)


def widen_blocks(weight: Tensor, scale: Tensor, block_rows: int, group_size: int) -> Tensor:
    """weight e4m3 [..., out, in], scale [..., blocks, groups] -> float32 [..., out, in], what the codes mean."""
    out_features, in_features = weight.shape[-2:]
    rows = scale.repeat_interleave(block_rows, dim=-2)[..., :out_features, :]
    return weight.float() * spread(rows, in_features, group_size)
