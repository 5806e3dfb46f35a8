"""A norm, the projection to gate and up, and the gate: in one kernel for few rows, in several for many."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plexor.kernels.cuda.stream_linear import Norm, StreamLinear, takes_pairs
from plexor.kernels.triton.norm_gated_linear import norm_gated_linear


class NormGatedLinear:
    """As plexor.kernels.reference.norm_gated_linear, for one layer."""

    def __init__(self) -> None:
        self._stream = StreamLinear()

    def __call__(
        self, x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> Tensor:
        weight = stored["weight"]
        if takes_pairs(x, weight, weight.shape[0] // 2):
            return self._stream.gated(x, Norm(gain, eps), weight, bias)
        return norm_gated_linear(x, gain, eps, stored, bias)
