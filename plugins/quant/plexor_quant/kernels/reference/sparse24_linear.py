"""The multiply of a dense layer with 2:4 weights."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.sparse24_layout import widen


def sparse24_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """x [T, in], weight [out, in / 2] in x's dtype, index uint8 [out, ceil(in / 8)] -> [T, out] in x's dtype.

    Products are summed in float32.
    """
    return (x.float() @ widen(weight, index).float().T).to(x.dtype)
