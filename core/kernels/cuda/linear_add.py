"""A dense linear layer added to the residual: streamed for few rows, by the library for many."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plexor.kernels.cuda.stream_linear import StreamLinear, takes
from plexor.kernels.triton.linear_add import linear_add


class LinearAdd:
    """As plexor.kernels.reference.linear_add, for one layer."""

    def __init__(self) -> None:
        self._stream = StreamLinear()

    def __call__(self, x: Tensor, stored: Mapping[str, Tensor], residual: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = stored["weight"]
        if takes(x, weight) and residual.stride(1) == 1:
            return self._stream.added(x, weight, residual, bias)
        return linear_add(x, stored, residual, bias)
