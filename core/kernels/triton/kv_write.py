"""Store the keys and values of new tokens in the paged cache: one program for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.triton.pdl import launch_next, overlaps, wait

WIDTH = 1024

SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def saturated(x, limit):
    """float32 x with what is beyond +-limit set to it; NaN fails both comparisons and stays."""
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x)


@triton.jit
def peak_of(x):
    """The largest magnitude in each row of x [heads, features], which is NaN if a number there is."""
    largest = tl.max(tl.abs(x), axis=1)
    return tl.where(tl.sum((x != x).to(tl.int32), axis=1) > 0, float("nan"), largest)


@triton.jit
def code_scale(peak):
    """What integers of a head whose largest magnitude is `peak` are multiplied by; that of zeros is tiny."""
    scale = tl.div_rn(peak, tl.full(peak.shape, 127.0, tl.float32))
    return tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)


@triton.jit
def codes(x, scale):
    """float32 x [heads, features] over each head's scale, to the nearest integer from -127 to 127, ties to even.

    A head with NaN or infinity gets a scale of NaN or infinity, and any codes: it reads as NaN.
    """
    quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    # The sum has no room for a fraction.
    nearest = (quotient + 12582912.0) - 12582912.0
    nearest = tl.where(nearest > -127.0, nearest, -127.0)
    return tl.where(nearest < 127.0, nearest, 127.0).to(tl.int8)


@triton.jit
def kv_write_kernel(
    k,
    v,
    slots,
    keys,
    values,
    entry_size,
    head_size,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    entry_stride,
    limit,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    element = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (element < entry_size) & (slot >= 0)
    head = element // head_size
    feature = element % head_size
    key = tl.load(k + token * k_token_stride + head * k_head_stride + feature, mask=inside, other=0.0)
    value = tl.load(v + token * v_token_stride + head * v_head_stride + feature, mask=inside, other=0.0)
    target = slot * entry_stride + element
    tl.store(keys + target, saturated(key.to(tl.float32), limit).to(keys.dtype.element_ty), mask=inside)
    tl.store(values + target, saturated(value.to(tl.float32), limit).to(values.dtype.element_ty), mask=inside)


@triton.jit
def scaled_kv_write_kernel(
    k,
    v,
    slots,
    keys,
    values,
    key_scales,
    value_scales,
    num_kv_heads,
    head_size,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    entry_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: HEADS heads of a token, keys or values."""
    launch_next(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    feature = tl.arange(0, SIZE)
    kept = (head < num_kv_heads) & (slot >= 0)
    inside = kept[:, None] & (feature < head_size)[None, :]
    place = slot * entry_stride + head[:, None] * head_size + feature[None, :]
    if tl.program_id(2) == 0:
        source = k + token * k_token_stride + head[:, None] * k_head_stride + feature[None, :]
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        scale = code_scale(peak_of(x))
        tl.store(keys + place, codes(x, scale), mask=inside)
        tl.store(key_scales + slot * num_kv_heads + head, scale, mask=kept)
    else:
        source = v + token * v_token_stride + head[:, None] * v_head_stride + feature[None, :]
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        scale = code_scale(peak_of(x))
        tl.store(values + place, codes(x, scale), mask=inside)
        tl.store(value_scales + slot * num_kv_heads + head, scale, mask=kept)


def scaled_kv_write(k: Tensor, v: Tensor, slots: Tensor, cache: LayerCache) -> None:
    """Store k, v [T, K, D] as integers with a scale for each token and head, as attention reads them.

    cache: "keys", "values" int8 [num_blocks, block_size, K, D], "key_scales", "value_scales" float32 without D, all
    contiguous. Otherwise as kv_write.
    """
    num_tokens, num_kv_heads, head_size = k.shape
    if num_tokens == 0:
        return
    keys, values = cache["keys"], cache["values"]
    size = triton.next_power_of_2(head_size)
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, WIDTH // size))
    pdl = overlaps(k.device)
    scaled_kv_write_kernel[(num_tokens, triton.cdiv(num_kv_heads, heads), 2)](
        k,
        v,
        slots,
        keys,
        values,
        cache["key_scales"],
        cache["value_scales"],
        num_kv_heads,
        head_size,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.stride(1),
        HEADS=heads,
        SIZE=size,
        PDL=pdl,
        launch_pdl=pdl,
    )


def kv_write(k: Tensor, v: Tensor, slots: Tensor, cache: LayerCache) -> None:
    """As plexor.kernels.reference.kv_write; the cache's entries [K, D] are contiguous."""
    num_tokens, num_kv_heads, head_size = k.shape
    if num_tokens == 0:
        return
    keys, values = cache["keys"], cache["values"]
    entry_size = num_kv_heads * head_size
    width = min(WIDTH, triton.next_power_of_2(entry_size))
    pdl = overlaps(k.device)
    kv_write_kernel[(num_tokens, triton.cdiv(entry_size, width))](
        k,
        v,
        slots,
        keys,
        values,
        entry_size,
        head_size,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.stride(1),
        storage_limit(k.dtype, keys.dtype),
        WIDTH=width,
        PDL=pdl,
        launch_pdl=pdl,
    )


def storage_limit(dtype: torch.dtype, storage: torch.dtype) -> float:
    """The largest finite value of the storage, infinity where it can hold all that dtype can."""
    limit = torch.finfo(storage).max
    return float("inf") if limit >= torch.finfo(dtype).max else limit
