"""A norm, the projection to queries, keys and values, rotation and cache: in one kernel for few rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.cuda.stream_linear import Norm, Rotation, StreamLinear, takes_rotation
from plexor.kernels.triton.norm_rotary_linear import norm_rotary_linear


class NormRotaryLinear:
    """As plexor.kernels.reference.norm_rotary_linear, for one layer."""

    def __init__(self) -> None:
        self._stream = StreamLinear()

    def __call__(
        self,
        x: Tensor,
        gain: Tensor,
        eps: float,
        stored: Mapping[str, Tensor],
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: LayerCache,
        bias: Tensor | None = None,
    ) -> Tensor:
        weight, rotation = stored["weight"], Rotation(cos, sin, positions, slots, cache)
        if takes_rotation(x, weight, rotation):
            return self._stream.rotated(x, Norm(gain, eps), weight, bias, rotation)
        return norm_rotary_linear(x, gain, eps, stored, cos, sin, positions, slots, cache, bias)
