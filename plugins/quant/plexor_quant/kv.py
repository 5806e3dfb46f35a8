"""The KV formats: e4m3 for the core's own cache ops, which saturate and widen, and int8 for ops of its own."""

from __future__ import annotations

import torch

from plexor.api import KVShape, Stored, kv_storage


def fp8_storage(shape: KVShape, dtype: torch.dtype) -> tuple[Stored, ...]:
    """What one layer keeps, whatever dtype the model computes in."""
    return kv_storage(shape, torch.float8_e4m3fn)


def int8_storage(shape: KVShape, dtype: torch.dtype) -> tuple[Stored, ...]:
    """int8 "keys" and "values", and beside each block a float32 scale for each of its tokens and heads."""
    scales = (shape.num_blocks, shape.block_size, shape.num_kv_heads)
    return (
        *kv_storage(shape, torch.int8),
        Stored("key_scales", scales, torch.float32, None, None),
        Stored("value_scales", scales, torch.float32, None, None),
    )
