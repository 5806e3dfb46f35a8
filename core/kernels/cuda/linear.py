"""A dense linear layer: streamed for few rows, by the library for many."""

from __future__ import annotations

from torch import Tensor

from plexor.kernels.cuda.stream_linear import StreamLinear, takes
from plexor.kernels.triton.linear import linear


class Linear:
    """As plexor.kernels.reference.linear, for one layer."""

    def __init__(self) -> None:
        self._stream = StreamLinear()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._stream.product(x, weight) if takes(x, weight) else linear(x, weight)
