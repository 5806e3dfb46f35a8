"""A norm, the projection behind it, rotation and the cache's new entries: one launch for few rows, three for more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from plexor.batch import LayerCache
from plexor.kernels.triton.kv_write import saturated, storage_limit
from plexor.kernels.triton.pdl import launch_next, wait
from plexor.kernels.triton.rms_norm import rms_norm
from plexor.kernels.triton.rotary_kv_write import rotary_kv_write
from plexor.kernels.triton.stream_linear import first_tiles, in_pairs, options, products, takes, tile_for


@triton.jit
def store_pair(target, half, first, second, limit, inside):
    """Values in the activations' dtype to features i and half + i, saturated where the target's dtype is narrower."""
    first = saturated(first.to(tl.float32), limit).to(target.dtype.element_ty)
    second = saturated(second.to(tl.float32), limit).to(target.dtype.element_ty)
    tl.store(target, first, mask=inside)
    tl.store(target + half, second, mask=inside)


@triton.jit
def norm_rotary_linear_kernel(
    x,
    gain,
    weight,
    bias,
    cos,
    sin,
    positions,
    slots,
    q,
    keys,
    values,
    num_heads,
    num_kv_heads,
    half,
    x_stride,
    weight_stride,
    entry_stride,
    eps,
    limit,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PAIRS: tl.constexpr,
    COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program owns features that turn together: pair p is features i and half + i of head p // half, i = p % half."""
    num_pairs = (num_heads + 2 * num_kv_heads) * half
    first = tl.program_id(0) * (OUTPUTS // 2)
    place = tl.arange(0, OUTPUTS)
    pair = tl.minimum(first + place // 2, num_pairs - 1)
    output = pair // half * 2 * half + pair % half + place % 2 * half
    tiles = first_tiles(weight, weight_stride, output, NUM_PAIRS, PAIRS)
    own = first + tl.arange(0, OUTPUTS // 2)
    head = (own // half)[:, None]
    feature = (own % half)[:, None]
    row = tl.arange(0, PADDED)[None, :]
    launch_next(PDL)
    wait(PDL)
    position = tl.load(positions + row, mask=row < ROWS, other=0)
    slot = tl.load(slots + row, mask=row < ROWS, other=-1)
    turns = head < num_heads + num_kv_heads
    c = tl.load(cos + position * half + feature, mask=turns, other=1.0)
    s = tl.load(sin + position * half + feature, mask=turns, other=0.0)
    y = products(
        tiles,
        weight,
        weight_stride,
        output,
        x,
        x_stride,
        gain,
        eps,
        ROWS,
        NUM_PAIRS,
        OUTPUTS,
        PAIRS,
        COMPILED,
    )
    if bias is not None:
        y += tl.load(bias + output).to(tl.float32)[:, None]
    a, b = in_pairs(y)
    turned_a = (a * c - b * s).to(q.dtype.element_ty)
    turned_b = (b * c + a * s).to(q.dtype.element_ty)

    inside = (own < num_pairs)[:, None] & (row < ROWS)
    target = q + (row.to(tl.int64) * num_heads + head) * 2 * half + feature
    store_pair(target, half, turned_a, turned_b, float("inf"), inside & (head < num_heads))
    inside &= slot >= 0
    entry = slot * entry_stride + feature
    kv_head = head - num_heads
    is_key = (kv_head >= 0) & (kv_head < num_kv_heads)
    store_pair(keys + entry + kv_head * 2 * half, half, turned_a, turned_b, limit, inside & is_key)
    kv_head -= num_kv_heads
    store_pair(values + entry + kv_head * 2 * half, half, turned_a, turned_b, limit, inside & (kv_head >= 0))


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
    """As plexor.kernels.reference.norm_rotary_linear, with rows whose last axis is contiguous, as are the cache's
    entries [K, D]. Heads that turn in part are done in steps.
    """
    weight, keys = stored["weight"], cache["keys"]
    num_kv_heads, head_size = keys.shape[2:]
    num_heads = weight.shape[0] // head_size - 2 * num_kv_heads
    half = cos.shape[1]
    if not takes(x, weight) or 2 * half != head_size:
        heads = functional.linear(rms_norm(x, gain, eps), weight, bias).unflatten(1, (-1, head_size))
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        return rotary_kv_write(q, k, v, cos, sin, positions, slots, cache)
    q = torch.empty(x.shape[0], num_heads, head_size, dtype=x.dtype, device=x.device)
    tile = tile_for(weight.shape[1], x.shape[0])
    norm_rotary_linear_kernel[(triton.cdiv(weight.shape[0] // 2, tile.outputs // 2),)](
        x,
        gain,
        weight,
        bias,
        cos,
        sin,
        positions,
        slots,
        q,
        keys,
        cache["values"],
        num_heads,
        num_kv_heads,
        half,
        x.stride(0),
        weight.stride(0),
        keys.stride(1),
        eps,
        storage_limit(x.dtype, keys.dtype),
        **options(x, tile),
    )
    return q
