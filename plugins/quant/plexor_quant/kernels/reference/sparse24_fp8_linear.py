"""The multiply of a dense layer with 2:4 weights in e4m3 and e4m3 activations."""

from __future__ import annotations

from torch import Tensor

from plexor_quant.kernels.reference.fp8_linear import fp8_linear
from plexor_quant.sparse24_layout import widen


def sparse24_fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """x [T, in], weight e4m3 [out, in / 2], scale float32 [out], index uint8 [out, ceil(in / 8)] -> [T, out].

    As fp8_linear with the zeros put back: each row of x is rounded to e4m3 with its own scale. A provider may leave the
    activations of few rows as they are, which is more exact. The result is in x's dtype.
    """
    return fp8_linear(x, widen(weight, index), scale)
