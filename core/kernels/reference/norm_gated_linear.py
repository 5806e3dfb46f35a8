"""A root mean square norm, the dense linear layer behind it, and the gate of a gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from plexor.kernels.reference.linear import linear
from plexor.kernels.reference.steps import gated_product


def norm_gated_linear(
    x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
) -> Tensor:
    """Norm x [T, in] with gain [in], multiply by "weight" [2 * I, in], gate in the first half, gate -> [T, I].

    bias [2 * I] is added before the gate. Providers may keep float32 between the steps, which the reference rounds to
    x's dtype.
    """
    return gated_product(partial(linear, weight=stored["weight"]), x, gain, eps, bias)
