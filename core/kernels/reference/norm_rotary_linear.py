"""A root mean square norm, the projection to queries, keys and values, rotation by position, and the cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.reference.linear import linear
from plexor.kernels.reference.steps import rotated_product


def norm_rotary_linear(
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
    """Norm x [T, in] with gain [in], multiply by "weight" [(N + 2 K) * D, in], rotate, store -> queries [T, N, D].

    Queries come first, then keys, then values; bias [(N + 2 K) * D] is added before they turn. The cache gives K and D,
    the rest is as in rotary_kv_write. Providers may keep float32 between the steps, which the reference rounds to x's
    dtype; what is stored is rounded to x's dtype first, then to the cache's.
    """
    product = partial(linear, weight=stored["weight"])
    return rotated_product(product, x, gain, eps, cos, sin, positions, slots, cache, bias)
