"""What fused ops do around a product, whichever it is: the definition of each in steps of other references."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.reference.rms_norm import rms_norm
from plexor.kernels.reference.rotary_kv_write import rotary_kv_write
from plexor.kernels.reference.silu_mul import silu_mul

RowProduct = Callable[[Tensor], Tensor]
"""x [T, in] -> [T, out]"""


def normed_product(product: RowProduct, x: Tensor, gain: Tensor, eps: float, bias: Tensor | None) -> Tensor:
    """product(rms_norm(x)) + bias, [T, out]."""
    y = product(rms_norm(x, gain, eps))
    return y if bias is None else y + bias


def added_product(product: RowProduct, x: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    """residual + (product(x) + bias), [T, out]."""
    y = product(x)
    return residual + (y if bias is None else y + bias)


def gated_product(product: RowProduct, x: Tensor, gain: Tensor, eps: float, bias: Tensor | None) -> Tensor:
    """silu_mul(product(rms_norm(x)) + bias), [T, out / 2]."""
    return silu_mul(normed_product(product, x, gain, eps, bias))


def rotated_product(
    product: RowProduct,
    x: Tensor,
    gain: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: LayerCache,
    bias: Tensor | None,
) -> Tensor:
    """Turned queries [T, N, D] of product(rms_norm(x)) + bias, whose turned keys and values go into the cache."""
    num_kv_heads, head_size = cache["keys"].shape[2:]
    heads = normed_product(product, x, gain, eps, bias).unflatten(1, (-1, head_size))
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    return rotary_kv_write(q, k, v, cos, sin, positions, slots, cache)
