"""The KV format fp8: keys and values as e4m3, for the core's own cache ops, which saturate and widen."""

from __future__ import annotations

import torch

from plexor.api import KVShape, Stored, kv_storage


def fp8_storage(shape: KVShape, dtype: torch.dtype) -> tuple[Stored, ...]:
    """What one layer keeps, whatever dtype the model computes in."""
    return kv_storage(shape, torch.float8_e4m3fn)
