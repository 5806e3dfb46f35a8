"""Which kernel multiplies: by the number of rows, and by how the operands lie."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from plexor.kernels.cuda.call import Call
from plexor.kernels.cuda.stream_linear import StreamLinear
from plexor.kernels.cuda.wide_linear import MAX_ROWS, WideLinear
from plexor.kernels.triton.rms_norm import rms_norm


def few(x: Tensor) -> bool:
    """Whether x [T, K] has so few rows that a kernel here may serve."""
    return 0 < x.shape[0] <= MAX_ROWS


class Products:
    """The kernels of one layer."""

    def __init__(self) -> None:
        self._stream = StreamLinear()
        self._wide = WideLinear()

    def run(self, call: Call | None) -> Tensor | None:
        """The call's y, on its way; None for a call that is better left to the library."""
        if call is None:
            return None
        if self._stream.takes(call):
            self._stream.launch(call)
            return call.y
        if self._wide.takes(call):
            normed = call.x if call.norm is None else rms_norm(call.x, call.norm.gain, call.norm.eps)
            self._wide.launch(replace(call, x=normed, norm=None))
            return call.y
        return None
