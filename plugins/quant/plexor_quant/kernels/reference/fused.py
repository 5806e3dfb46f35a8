"""Products with coded weights and what is done around them in one op: norm, residual, gate, rotation and cache.

Each op is what the core's op of the same kind is (norm_linear, linear_add, norm_gated_linear, norm_rotary_linear), but
that the product is a format's: "weight" and "scale", and "zero" where there are zero points, as its own reference takes
them. Providers may keep float32 between the steps, which these round to x's dtype. Where a format rounds activations,
providers may leave those of few rows as they are, which is nearer to the dense product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from plexor.api import LayerCache, PlexorError, added_product, gated_product, normed_product, rotated_product
from plexor_quant.kernels.reference.fp8_linear import fp8_linear
from plexor_quant.kernels.reference.int4_wo_linear import int4_wo_linear
from plexor_quant.kernels.reference.int8_linear import int8_linear
from plexor_quant.kernels.reference.int8_wo_linear import int8_wo_linear
from plexor_quant.kernels.reference.w4a_fp8_linear import w4a_fp8_linear

StoredProduct = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""(x [T, in], stored) -> [T, out]"""


def row_group_size(in_features: int, num_groups: int) -> int:
    """The group size, a power of two or all of a row, that makes so many groups of a row's features."""
    if num_groups == 1:
        return in_features
    size = 1
    while -(-in_features // size) > num_groups:
        size *= 2
    if -(-in_features // size) != num_groups:
        raise PlexorError(
            f"{num_groups} scales for {in_features} input features are of no group size that is a power of two: "
            "fused products take no others, multiply and fuse in steps"
        )
    return size


def stored_product(product: Callable[..., Tensor]) -> StoredProduct:
    """An op of (x, weight, scale), or of (x, weight, scale, group size, zero), as a function of what is stored."""

    def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        weight, scale = stored["weight"], stored["scale"]
        if scale.dim() == 1:
            return product(x, weight, scale)
        return product(x, weight, scale, row_group_size(x.shape[1], scale.shape[1]), stored.get("zero"))

    return multiply


def norm_linear(
    product: StoredProduct,
    x: Tensor,
    gain: Tensor,
    eps: float,
    stored: Mapping[str, Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """Norm x [T, in] with gain [in], multiply, add bias [out] -> [T, out]."""
    return normed_product(lambda rows: product(rows, stored), x, gain, eps, bias)


def linear_add(
    product: StoredProduct, x: Tensor, stored: Mapping[str, Tensor], residual: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply x [T, in], add bias [out] and residual [T, out], which is given up -> [T, out]."""
    return added_product(lambda rows: product(rows, stored), x, residual, bias)


def norm_gated_linear(
    product: StoredProduct,
    x: Tensor,
    gain: Tensor,
    eps: float,
    stored: Mapping[str, Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """Norm x [T, in] with gain [in], multiply, add bias [2 * I], gate in the first half, gate -> [T, I]."""
    return gated_product(lambda rows: product(rows, stored), x, gain, eps, bias)


def norm_rotary_linear(
    product: StoredProduct,
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
    """Norm x [T, in] with gain [in], multiply, add bias, rotate and store -> queries [T, N, D]."""
    return rotated_product(lambda rows: product(rows, stored), x, gain, eps, cos, sin, positions, slots, cache, bias)


FP8 = stored_product(fp8_linear)
INT8 = stored_product(int8_linear)
W4A_FP8 = stored_product(w4a_fp8_linear)
INT8_WO = stored_product(int8_wo_linear)
INT4_WO = stored_product(int4_wo_linear)

fp8_norm_linear = partial(norm_linear, FP8)
fp8_linear_add = partial(linear_add, FP8)
fp8_norm_gated_linear = partial(norm_gated_linear, FP8)
fp8_norm_rotary_linear = partial(norm_rotary_linear, FP8)

int8_norm_linear = partial(norm_linear, INT8)
int8_linear_add = partial(linear_add, INT8)
int8_norm_gated_linear = partial(norm_gated_linear, INT8)
int8_norm_rotary_linear = partial(norm_rotary_linear, INT8)

w4a_fp8_norm_linear = partial(norm_linear, W4A_FP8)
w4a_fp8_linear_add = partial(linear_add, W4A_FP8)
w4a_fp8_norm_gated_linear = partial(norm_gated_linear, W4A_FP8)
w4a_fp8_norm_rotary_linear = partial(norm_rotary_linear, W4A_FP8)

int8_wo_norm_linear = partial(norm_linear, INT8_WO)
int8_wo_linear_add = partial(linear_add, INT8_WO)
int8_wo_norm_gated_linear = partial(norm_gated_linear, INT8_WO)
int8_wo_norm_rotary_linear = partial(norm_rotary_linear, INT8_WO)

int4_wo_norm_linear = partial(norm_linear, INT4_WO)
int4_wo_linear_add = partial(linear_add, INT4_WO)
int4_wo_norm_gated_linear = partial(norm_gated_linear, INT4_WO)
int4_wo_norm_rotary_linear = partial(norm_rotary_linear, INT4_WO)
