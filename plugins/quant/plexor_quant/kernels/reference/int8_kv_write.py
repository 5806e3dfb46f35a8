"""Store the keys and values of new tokens as int8 in the paged cache."""

from __future__ import annotations

from torch import Tensor

from plexor.api import LayerCache
from plexor_quant.rounding import round_int8


def int8_kv_write(k: Tensor, v: Tensor, slots: Tensor, cache: LayerCache) -> None:
    """k, v [T, K, D] to cache "keys", "values" int8 [num_blocks, block_size, K, D] at slots [T] int64.

    Each head of a token is rounded with a scale of its own, float32, kept in "key_scales", "value_scales"
    [num_blocks, block_size, K]. A slot is block * block_size + offset; -1 marks padding, which is not written. A head
    with NaN or infinity reads as NaN.
    """
    if slots.numel() and int(slots.min()) < 0:
        written = slots >= 0
        k, v, slots = k[written], v[written], slots[written]
    for new, entries, scales in ((k, "keys", "key_scales"), (v, "values", "value_scales")):
        codes, scale = round_int8(new)
        cache[entries].flatten(0, 1).index_put_((slots,), codes)
        cache[scales].flatten(0, 1).index_put_((slots,), scale.squeeze(-1))
