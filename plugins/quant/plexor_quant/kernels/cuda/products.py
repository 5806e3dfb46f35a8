"""Which kernel multiplies a coded weight: by the number of rows, if the operands lie as it needs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from plexor_quant.kernels.cuda.coded import CodedCall
from plexor_quant.kernels.cuda.stream_coded import StreamCoded

STREAM_ROWS = 16
"""The most rows that stream_coded takes."""

Many = Callable[[CodedCall], Tensor | None]
"""The call's y, on its way, for more rows than STREAM_ROWS; None for a call that it does not take. The call's norm is
still to be applied and its activations to be rounded."""


class CodedProducts:
    """The kernels of one layer."""

    def __init__(self, many: Callable[[], Many] | None = None) -> None:
        """many: makes what multiplies many rows of this layer."""
        self._stream = StreamCoded()
        self._many = None if many is None else many()

    def takes(self, x: Tensor) -> bool:
        """Whether a kernel may serve so many rows."""
        return x.shape[0] > 0 and (x.shape[0] <= STREAM_ROWS or self._many is not None)

    def run(self, coded: CodedCall | None) -> Tensor | None:
        """The call's y, on its way; None for a call that is left to steps of other ops."""
        if coded is None or not coded.lies_well():
            return None
        if coded.num_rows > STREAM_ROWS:
            return None if self._many is None else self._many(coded)
        return self._stream(coded)
