"""Rotate queries and keys and store keys and values in one launch: a program takes the heads of one token.

The heads are asked for first, and are on their way while the program waits for its position, and then for the row of
the tables that the position names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.triton.kv_write import code_scale, codes, peak_of, saturated, storage_limit
from plexor.kernels.triton.pdl import launch_next, overlaps, wait

MOST_HEADS = 32
"""Query heads of one program; a token with more of them is shared out between several."""

NUMBERS = 96
"""That a thread holds at most: a dozen loads of 16 bytes each are then under way."""


@triton.jit
def places(head, num_heads, head_stride, first, end, WIDTH: tl.constexpr):
    """Where features first to end of some heads lie, and which of the places exist."""
    feature = first + tl.arange(0, WIDTH)
    inside = (head < num_heads)[:, None] & (feature < end)[None, :]
    return head[:, None] * head_stride + feature[None, :], inside


@triton.jit
def load_heads(source, head, num_heads, head_stride, first, end, WIDTH: tl.constexpr):
    """Features first to end of some heads."""
    place, inside = places(head, num_heads, head_stride, first, end, WIDTH)
    return tl.load(source + place, mask=inside, other=0.0)


@triton.jit
def store_heads(x, target, head, num_heads, head_size, first, end, kept, limit):
    """Store load_heads' features in the target's dtype, if kept."""
    place, inside = places(head, num_heads, head_size, first, end, x.shape[1])
    x = saturated(x.to(tl.float32), limit).to(target.dtype.element_ty)
    tl.store(target + place, x, mask=inside & kept)


@triton.jit
def store_codes(x, scale, target, head, num_heads, head_size, first, end, kept):
    """Store load_heads' features as integers, if kept."""
    place, inside = places(head, num_heads, head_size, first, end, x.shape[1])
    tl.store(target + place, codes(x.to(tl.float32), scale), mask=inside & kept)


@triton.jit
def turn(first, second, cos, sin):
    """Both halves of what turns, rounded to the activations' dtype."""
    a, b = first.to(tl.float32), second.to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)


@triton.jit
def larger(a, b):
    """Of two numbers that may be NaN, which stays."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def rotary_kv_write_kernel(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    slots,
    out,
    keys,
    values,
    key_scales,
    value_scales,
    num_heads,
    num_kv_heads,
    head_size,
    half,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    entry_stride,
    limit,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    q += token * q_token_stride
    k += token * k_token_stride
    v += token * v_token_stride
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    kv_head = tl.program_id(1) * KV_HEADS + tl.arange(0, KV_HEADS)
    q_first = load_heads(q, head, num_heads, q_head_stride, 0, half, HALF)
    q_second = load_heads(q + half, head, num_heads, q_head_stride, 0, half, HALF)
    k_first = load_heads(k, kv_head, num_kv_heads, k_head_stride, 0, half, HALF)
    k_second = load_heads(k + half, kv_head, num_kv_heads, k_head_stride, 0, half, HALF)
    value = load_heads(v, kv_head, num_kv_heads, v_head_stride, 0, head_size, SIZE)
    if REST > 0:
        q_rest = load_heads(q, head, num_heads, q_head_stride, 2 * half, head_size, REST)
        k_rest = load_heads(k, kv_head, num_kv_heads, k_head_stride, 2 * half, head_size, REST)

    # Moved up by the compiler, the wait for the position would keep the heads from being asked for.
    tl.debug_barrier()
    slot = tl.load(slots + token)
    feature = tl.arange(0, HALF)
    angle = tl.load(positions + token) * half + feature
    c = tl.load(cos + angle, mask=feature < half, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=feature < half, other=0.0)[None, :]

    out += token * num_heads * head_size
    q_first, q_second = turn(q_first, q_second, c, s)
    store_heads(q_first, out, head, num_heads, head_size, 0, half, True, float("inf"))
    store_heads(q_second, out + half, head, num_heads, head_size, 0, half, True, float("inf"))
    keys += slot * entry_stride
    values += slot * entry_stride
    kept = slot >= 0
    k_first, k_second = turn(k_first, k_second, c, s)
    if REST > 0:
        store_heads(q_rest, out, head, num_heads, head_size, 2 * half, head_size, True, float("inf"))
    if SCALED:
        key_scales += slot * num_kv_heads + kv_head
        value_scales += slot * num_kv_heads + kv_head
        there = kept & (kv_head < num_kv_heads)
        scale = code_scale(peak_of(value.to(tl.float32)))
        store_codes(value, scale, values, kv_head, num_kv_heads, head_size, 0, head_size, kept)
        tl.store(value_scales, scale, mask=there)
        peak = larger(peak_of(k_first.to(tl.float32)), peak_of(k_second.to(tl.float32)))
        if REST > 0:
            peak = larger(peak, peak_of(k_rest.to(tl.float32)))
        scale = code_scale(peak)
        store_codes(k_first, scale, keys, kv_head, num_kv_heads, head_size, 0, half, kept)
        store_codes(k_second, scale, keys + half, kv_head, num_kv_heads, head_size, 0, half, kept)
        if REST > 0:
            store_codes(k_rest, scale, keys, kv_head, num_kv_heads, head_size, 2 * half, head_size, kept)
        tl.store(key_scales, scale, mask=there)
    else:
        store_heads(value, values, kv_head, num_kv_heads, head_size, 0, head_size, kept, limit)
        store_heads(k_first, keys, kv_head, num_kv_heads, head_size, 0, half, kept, limit)
        store_heads(k_second, keys + half, kv_head, num_kv_heads, head_size, 0, half, kept, limit)
        if REST > 0:
            store_heads(k_rest, keys, kv_head, num_kv_heads, head_size, 2 * half, head_size, kept, limit)


def rotary_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, cache: LayerCache
) -> Tensor:
    """As plexor.kernels.reference.rotary_kv_write; the cache's entries [K, D] are contiguous.

    Into a cache with "key_scales", "value_scales" keys and values go as scaled_kv_write stores them.
    """
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads, half = k.shape[1], cos.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    key_scales, value_scales = cache.get("key_scales"), cache.get("value_scales")
    scaled = key_scales is not None
    rest = head_size - 2 * half
    num_parts = triton.cdiv(num_heads, MOST_HEADS)
    heads, kv_heads = (triton.next_power_of_2(triton.cdiv(number, num_parts)) for number in (num_heads, num_kv_heads))
    size = triton.next_power_of_2(head_size)
    pdl = overlaps(q.device)
    rotary_kv_write_kernel[(num_tokens, num_parts)](
        q,
        k,
        v,
        cos,
        sin,
        positions,
        slots,
        out,
        cache["keys"],
        cache["values"],
        key_scales,
        value_scales,
        num_heads,
        num_kv_heads,
        head_size,
        half,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cache["keys"].stride(1),
        float("inf") if scaled else storage_limit(k.dtype, cache["keys"].dtype),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(rest) if rest else 0,
        SIZE=size,
        SCALED=scaled,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=triton.next_power_of_2(triton.cdiv((heads + 2 * kv_heads) * size, 32 * NUMBERS)),
    )
    return out
