"""The providers "cuda" of products with coded weights: one kernel for few rows, steps of other kernels otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from plexor.api import (
    Call,
    LayerCache,
    Norm,
    Rotation,
    added_call,
    gated_call,
    product_call,
    rms_norm,
    rotary_kv_write,
    rotated_call,
    silu_mul,
)
from plexor_quant.kernels.cuda.coded import Activations, CodedCall, Codes, codes_of
from plexor_quant.kernels.cuda.products import CodedProducts, Many
from plexor_quant.kernels.cuda.w4 import W4Linear
from plexor_quant.kernels.cuda.wide import E4M3_ROWS, WideCoded
from plexor_quant.kernels.reference import fp8_linear as reference_fp8
from plexor_quant.kernels.reference import int4_wo_linear as reference_int4_wo
from plexor_quant.kernels.reference import int8_linear as reference_int8
from plexor_quant.kernels.reference import int8_wo_linear as reference_int8_wo
from plexor_quant.kernels.reference import w4a_fp8_linear as reference_w4a_fp8
from plexor_quant.kernels.reference.fused import stored_product
from plexor_quant.kernels.torch import fp8_linear as torch_fp8
from plexor_quant.kernels.torch import int4_wo_linear as torch_int4_wo
from plexor_quant.kernels.torch import int8_linear as torch_int8
from plexor_quant.kernels.torch import int8_wo_linear as torch_int8_wo
from plexor_quant.kernels.torch import w4a_fp8_linear as torch_w4a_fp8


@dataclass(frozen=True, slots=True)
class CodedFormat:
    """What tells one format's products from another's.

    product: the op for bfloat16 where no kernel here takes it; reference: the same for float16. many: makes the kernels
    of many rows for a layer. normed: as product, of (x, gain, eps, weight, scale), with a norm of x before it.
    """

    activations: Activations
    product: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    many: Callable[[], Many] | None = None
    normed: Callable[..., Tensor] | None = None

    def other(self, x: Tensor) -> Callable[..., Tensor]:
        """The op by another provider."""
        return self.product if x.dtype == torch.bfloat16 else self.reference


FP8 = CodedFormat(
    Activations.E4M3,
    torch_fp8.fp8_linear,
    reference_fp8.fp8_linear,
    partial(WideCoded, E4M3_ROWS),
    torch_fp8.normed_fp8_linear,
)
INT8 = CodedFormat(Activations.INT8, torch_int8.int8_linear, reference_int8.int8_linear, WideCoded)
W4A_FP8 = CodedFormat(Activations.E4M3, torch_w4a_fp8.w4a_fp8_linear, reference_w4a_fp8.w4a_fp8_linear, W4Linear)
INT8_WO = CodedFormat(Activations.AS_THEY_ARE, torch_int8_wo.int8_wo_linear, reference_int8_wo.int8_wo_linear)
INT4_WO = CodedFormat(Activations.AS_THEY_ARE, torch_int4_wo.int4_wo_linear, reference_int4_wo.int4_wo_linear, W4Linear)


class _Layer:
    """What the providers share: the kernels of one layer."""

    def __init__(self, number_format: CodedFormat) -> None:
        self._format = number_format
        self._products = CodedProducts(number_format.many)

    def _run(self, call: Call | None, codes: Codes) -> Tensor | None:
        return None if call is None else self._products.run(CodedCall(call, codes, self._format.activations))

    def _multiply(self, x: Tensor, stored: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """The product by another provider."""
        y = stored_product(self._format.other(x))(x, stored)
        return y if bias is None else y + bias

    def _multiply_normed(
        self, x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None
    ) -> Tensor:
        """The product of normed rows by another provider."""
        if self._format.normed is None or x.dtype != torch.bfloat16:
            return self._multiply(rms_norm(x, gain, eps), stored, bias)
        y = self._format.normed(x, gain, eps, stored["weight"], stored["scale"])
        return y if bias is None else y + bias


class Linear(_Layer):
    """A format's own op: (x, weight, scale), or (x, weight, scale, group size, zero)."""

    def __call__(
        self, x: Tensor, weight: Tensor, scale: Tensor, group_size: int | None = None, zero: Tensor | None = None
    ) -> Tensor:
        if self._products.takes(x):
            codes = Codes(weight, scale, zero, x.shape[1] if group_size is None else group_size)
            y = self._run(product_call(x, weight), codes)
            if y is not None:
                return y
        other = self._format.other(x)
        return other(x, weight, scale) if group_size is None else other(x, weight, scale, group_size, zero)


class NormLinear(_Layer):
    """As plexor_quant.kernels.reference.fused.norm_linear."""

    def __call__(
        self, x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> Tensor:
        if self._products.takes(x):
            call = product_call(x, stored["weight"], Norm(gain, eps), bias)
            y = self._run(call, codes_of(stored, x.shape[1]))
            if y is not None:
                return y
        return self._multiply_normed(x, gain, eps, stored, bias)


class LinearAdd(_Layer):
    """As plexor_quant.kernels.reference.fused.linear_add."""

    def __call__(self, x: Tensor, stored: Mapping[str, Tensor], residual: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._products.takes(x) and residual.stride(1) == 1:
            y = self._run(added_call(x, stored["weight"], residual, bias), codes_of(stored, x.shape[1]))
            if y is not None:
                return y
        return residual.add_(self._multiply(x, stored, bias))


class NormGatedLinear(_Layer):
    """As plexor_quant.kernels.reference.fused.norm_gated_linear."""

    def __call__(
        self, x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> Tensor:
        if self._products.takes(x):
            call = gated_call(x, stored["weight"], Norm(gain, eps), bias)
            y = self._run(call, codes_of(stored, x.shape[1]))
            if y is not None:
                return y
        return silu_mul(self._multiply_normed(x, gain, eps, stored, bias))


class NormRotaryLinear(_Layer):
    """As plexor_quant.kernels.reference.fused.norm_rotary_linear."""

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
        if self._products.takes(x):
            rotation = Rotation(cos, sin, positions, slots, cache)
            call = rotated_call(x, stored["weight"], Norm(gain, eps), bias, rotation)
            queries = self._run(call, codes_of(stored, x.shape[1]))
            if queries is not None:
                return queries
        num_kv_heads, head_size = cache["keys"].shape[2:]
        heads = self._multiply_normed(x, gain, eps, stored, bias).unflatten(1, (-1, head_size))
        q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
        return rotary_kv_write(q, k, v, cos, sin, positions, slots, cache)


fp8_linear = partial(Linear, FP8)
fp8_norm_linear = partial(NormLinear, FP8)
fp8_linear_add = partial(LinearAdd, FP8)
fp8_norm_gated_linear = partial(NormGatedLinear, FP8)
fp8_norm_rotary_linear = partial(NormRotaryLinear, FP8)

int8_linear = partial(Linear, INT8)
int8_norm_linear = partial(NormLinear, INT8)
int8_linear_add = partial(LinearAdd, INT8)
int8_norm_gated_linear = partial(NormGatedLinear, INT8)
int8_norm_rotary_linear = partial(NormRotaryLinear, INT8)

w4a_fp8_linear = partial(Linear, W4A_FP8)
w4a_fp8_norm_linear = partial(NormLinear, W4A_FP8)
w4a_fp8_linear_add = partial(LinearAdd, W4A_FP8)
w4a_fp8_norm_gated_linear = partial(NormGatedLinear, W4A_FP8)
w4a_fp8_norm_rotary_linear = partial(NormRotaryLinear, W4A_FP8)

int8_wo_linear = partial(Linear, INT8_WO)
int8_wo_norm_linear = partial(NormLinear, INT8_WO)
int8_wo_linear_add = partial(LinearAdd, INT8_WO)
int8_wo_norm_gated_linear = partial(NormGatedLinear, INT8_WO)
int8_wo_norm_rotary_linear = partial(NormRotaryLinear, INT8_WO)

int4_wo_linear = partial(Linear, INT4_WO)
int4_wo_norm_linear = partial(NormLinear, INT4_WO)
int4_wo_linear_add = partial(LinearAdd, INT4_WO)
int4_wo_norm_gated_linear = partial(NormGatedLinear, INT4_WO)
int4_wo_norm_rotary_linear = partial(NormRotaryLinear, INT4_WO)
