"""Store the keys and values of new tokens in the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor.batch import LayerCache


def kv_write(k: Tensor, v: Tensor, slots: Tensor, cache: LayerCache) -> None:
    """k, v [T, K, D] to cache "keys", "values" [num_blocks, block_size, K, D] at slots [T] int64.

    A slot is block * block_size + offset; -1 marks padding, which is not written. Values beyond the range of the
    cache's dtype are stored as its largest finite ones; NaN stays NaN.
    """
    if slots.numel() and int(slots.min()) < 0:
        written = slots >= 0
        k, v, slots = k[written], v[written], slots[written]
    for entry, new in ((cache["keys"], k), (cache["values"], v)):
        entry.view(-1, *entry.shape[2:]).index_put_((slots,), saturated(new, entry.dtype))


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x to another floating dtype, with what exceeds its range at its largest finite value; NaN stays NaN."""
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(x.dtype).max:
        return x.to(dtype)
    return x.float().clamp(-limit, limit).to(dtype)
