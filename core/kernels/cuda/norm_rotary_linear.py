"""A norm, the projection to queries, keys and values, rotation and cache: in one kernel for few rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.cuda.call import Norm, Rotation, rotated_call
from plexor.kernels.cuda.products import Choose, Products, best_known, few
from plexor.kernels.triton.norm_rotary_linear import norm_rotary_linear


class NormRotaryLinear:
    """As plexor.kernels.reference.norm_rotary_linear, for one layer."""

    def __init__(self, choose: Choose = best_known) -> None:
        self._products = Products(choose)

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
        rotation = Rotation(cos, sin, positions, slots, cache)
        q = self._products.run(rotated_call(x, stored["weight"], Norm(gain, eps), bias, rotation)) if few(x) else None
        if q is None:
            return norm_rotary_linear(x, gain, eps, stored, cos, sin, positions, slots, cache, bias)
        return q
