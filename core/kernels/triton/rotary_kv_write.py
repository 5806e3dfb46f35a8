"""Rotate queries and keys and store keys and values in one launch: a program takes some heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.triton.kv_write import saturated, storage_limit
from plexor.kernels.triton.pdl import launch_next, overlaps, wait

HEADS = 4
"""Heads that a program turns; four times as many where there are many tokens: cosines are then looked up less often."""
MANY_TOKENS = 512


@triton.jit
def turn_heads(
    source,
    source_stride,
    target,
    head,
    num_heads,
    head_size,
    cos,
    sin,
    half,
    limit,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Rotate the first 2 * half features of some heads and copy the rest, from source to target."""
    source = source + head[:, None] * source_stride
    target = target + head[:, None] * head_size
    feature = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads)[:, None] & (feature < half)
    first = tl.load(source + feature, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + feature, mask=inside, other=0.0).to(tl.float32)
    turned_first = (first * cos - second * sin).to(source.dtype.element_ty).to(tl.float32)
    turned_second = (second * cos + first * sin).to(source.dtype.element_ty).to(tl.float32)
    tl.store(target + feature, saturated(turned_first, limit).to(target.dtype.element_ty), mask=inside)
    tl.store(target + half + feature, saturated(turned_second, limit).to(target.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < num_heads)[:, None] & (rest < head_size)
        passed = tl.load(source + rest, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + rest, saturated(passed, limit).to(target.dtype.element_ty), mask=inside)


@triton.jit
def copy_heads(source, source_stride, target, head, num_heads, head_size, limit, SIZE: tl.constexpr):
    """Store some heads as they are."""
    feature = tl.arange(0, SIZE)[None, :]
    inside = (head < num_heads)[:, None] & (feature < head_size)
    value = tl.load(source + head[:, None] * source_stride + feature, mask=inside, other=0.0).to(tl.float32)
    value = saturated(value, limit).to(target.dtype.element_ty)
    tl.store(target + head[:, None] * head_size + feature, value, mask=inside)


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
    HALF: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_query_parts = tl.cdiv(num_heads, HEADS)
    feature = tl.arange(0, HALF)
    angle = tl.load(positions + token) * half + feature
    c = tl.load(cos + angle, mask=feature < half, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=feature < half, other=0.0)[None, :]
    if part < num_query_parts:
        queries = part * HEADS + tl.arange(0, HEADS)
        turn_heads(
            q + token * q_token_stride,
            q_head_stride,
            out + token * num_heads * head_size,
            queries,
            num_heads,
            head_size,
            c,
            s,
            half,
            float("inf"),
            HALF,
            REST,
        )
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            head = (part - num_query_parts) * HEADS + tl.arange(0, HEADS)
            entry = slot * entry_stride
            turn_heads(
                k + token * k_token_stride,
                k_head_stride,
                keys + entry,
                head,
                num_kv_heads,
                head_size,
                c,
                s,
                half,
                limit,
                HALF,
                REST,
            )
            copy_heads(
                v + token * v_token_stride, v_head_stride, values + entry, head, num_kv_heads, head_size, limit, SIZE
            )


def rotary_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, cache: LayerCache
) -> Tensor:
    """As plexor.kernels.reference.rotary_kv_write; the cache's entries [K, D] are contiguous."""
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads, half = k.shape[1], cos.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    rest = head_size - 2 * half
    pdl = overlaps(q.device)
    heads = HEADS if num_tokens < MANY_TOKENS else 4 * HEADS
    grid = (num_tokens, triton.cdiv(num_heads, heads) + triton.cdiv(num_kv_heads, heads))
    rotary_kv_write_kernel[grid](
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
        storage_limit(k.dtype, cache["keys"].dtype),
        HEADS=heads,
        HALF=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(rest) if rest else 0,
        SIZE=triton.next_power_of_2(head_size),
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=2 if heads == HEADS else 4,
    )
    return out
