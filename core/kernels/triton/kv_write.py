"""Store the keys and values of new tokens in the paged cache: one program for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.triton.pdl import launch_next, overlaps, wait

WIDTH = 1024


@triton.jit
def saturated(x, limit):
    """float32 x with what is beyond +-limit set to it; NaN fails both comparisons and stays."""
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x)


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
