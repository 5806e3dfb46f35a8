"""A root mean square norm and a dense linear layer: in one kernel for few rows, in two for many."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plexor.kernels.cuda.stream_linear import Norm, StreamLinear, takes
from plexor.kernels.triton.norm_linear import norm_linear


class NormLinear:
    """As plexor.kernels.reference.norm_linear, for one layer."""

    def __init__(self) -> None:
        self._stream = StreamLinear()

    def __call__(
        self, x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> Tensor:
        weight = stored["weight"]
        if takes(x, weight):
            return self._stream.normed(x, Norm(gain, eps), weight, bias)
        return norm_linear(x, gain, eps, stored, bias)
