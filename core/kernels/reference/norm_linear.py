"""A root mean square norm and the dense linear layer behind it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from plexor.kernels.reference.linear import linear
from plexor.kernels.reference.steps import normed_product


def norm_linear(
    x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
) -> Tensor:
    """Norm x [T, in] with gain [in], multiply by "weight" [out, in], add bias [out] -> [T, out].

    Providers may keep float32 between the steps, which the reference rounds to x's dtype.
    """
    return normed_product(partial(linear, weight=stored["weight"]), x, gain, eps, bias)
