"""Products of 17 rows and more over e4m3 or int8 weights, on the tensor cores, which know these numbers.

Rows are rounded by a kernel of their own, with the norm before it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from plexor.api import Call, TiledLinear, TiledScales, lies_in_pairs, num_multiprocessors, tiled_cut_for
from plexor_quant.kernels.cuda.coded import CodedCall
from plexor_quant.kernels.triton.round_rows import round_normed, round_rows

E4M3_ROWS = 128
"""Of bfloat16 that are multiplied by e4m3 weights here; torch's product takes more."""

_BOX = 128
"""Inputs that a copy brings at once."""


class WideCoded:
    """The product of one layer, for `plexor_quant.kernels.cuda.products.Many`."""

    def __init__(self, most_rows: int | None = None) -> None:
        """most_rows: of bfloat16, if more are left to another provider."""
        self._most_rows = most_rows
        self._tiled = TiledLinear()

    def __call__(self, coded: CodedCall) -> Tensor | None:
        """The call's y, on its way; None for what the kernel does not take, or another provider does better."""
        call, codes = coded.call, coded.codes
        if self._most_rows is not None and call.num_rows > self._most_rows and call.x.dtype == torch.bfloat16:
            return None
        num_outputs, num_inputs = codes.weight.shape
        if num_inputs % _BOX or not lies_in_pairs(call):
            return None
        sizes = (call.num_rows, num_outputs, num_inputs // _BOX, call.pair)
        cut = tiled_cut_for(*sizes, num_multiprocessors(call.x))
        if cut is None:
            return None
        x, scale = rounded(call, codes.weight.dtype)
        self._tiled.launch(replace(call, x=x, norm=None), cut, TiledScales(scale, codes.scale))
        return call.y


def rounded(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes of the call's rows, normed if it says so, and their scales [T, 1]."""
    if call.norm is None:
        return round_rows(call.x, dtype)
    return round_normed(call.x, call.norm.gain, call.norm.eps, dtype)
