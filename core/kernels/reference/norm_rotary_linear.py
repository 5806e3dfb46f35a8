"""A root mean square norm, the projection to queries, keys and values, rotation by position, and the cache."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.reference.norm_linear import norm_linear
from plexor.kernels.reference.rotary_kv_write import rotary_kv_write


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
    num_kv_heads, head_size = cache["keys"].shape[2:]
    heads = norm_linear(x, gain, eps, stored, bias).unflatten(1, (-1, head_size))
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    return rotary_kv_write(q, k, v, cos, sin, positions, slots, cache)
