"""Which kernel multiplies: as chosen for the product's size and number of rows, if the operands lie as it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from plexor.kernels.cuda.call import Call, num_multiprocessors
from plexor.kernels.cuda.choice import TILED_ROWS, Cut, Stream, choose
from plexor.kernels.cuda.stream_linear import StreamLinear
from plexor.kernels.cuda.tiled_layout import TiledCut
from plexor.kernels.cuda.tiled_linear import TiledLinear, lies_in_pairs
from plexor.kernels.triton.rms_norm import rms_norm
from plexor.kernels.tuning import tuned

Choose = Callable[[Call], Cut]


def few(x: Tensor) -> bool:
    """Whether x [T, K] has so few rows that a kernel here may serve."""
    return 0 < x.shape[0] <= TILED_ROWS


def best_known(call: Call) -> Cut:
    """What was measured on this GPU, else the rule."""
    choices = tuned(torch.cuda.get_device_name(call.x.device))
    return choose(choices, call.product, call.num_rows, call.pair, num_multiprocessors(call.x))


class Products:
    """The kernels of one layer; what `choose` says is kept for each size."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._cuts: dict[tuple[int | None, ...], Cut] = {}
        self._stream = StreamLinear()
        self._tiled = TiledLinear()

    def run(self, call: Call | None) -> Tensor | None:
        """The call's y, on its way; None for a call that is better left to the library."""
        if call is None or not call.lies_well():
            return None
        cut = self._cut(call)
        if cut is None or (isinstance(cut, TiledCut) and not lies_in_pairs(call)):
            return None
        if isinstance(cut, Stream):
            self._stream.launch(call, cut)
            return call.y
        normed = call.x if call.norm is None else rms_norm(call.x, call.norm.gain, call.norm.eps)
        self._tiled.launch(replace(call, x=normed, norm=None), cut)
        return call.y

    def _cut(self, call: Call) -> Cut:
        size = (call.num_rows, *call.weight.shape, call.pair)
        if size not in self._cuts:
            self._cuts[size] = self._choose(call)
        return self._cuts[size]
