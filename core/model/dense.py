"""The built-in number format: weights in the model's own dtype, nothing converted."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from plexor.kernels.table import KernelTable
from plexor.model.build import facts
from plexor.model.format import Fusion, GroupedMultiply, KVShape, LinearShape, Multiply, Stored


class DenseFormat:
    """Keeps "weight" [out, in] as it is; a LinearFormat and a FusingFormat."""

    fused: Mapping[Fusion, str] = MappingProxyType(
        {
            "norm": "norm_linear",
            "add": "linear_add",
            "norm_gated": "norm_gated_linear",
            "norm_rotary": "norm_rotary_linear",
        }
    )

    def __str__(self) -> str:
        return "dense"

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        return (Stored("weight", (shape.out_features, shape.in_features), dtype, 0, 1),)

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"].float()

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features}
        product = table.bind("linear", facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = product(x, stored["weight"])
            return y

        return multiply

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features, "groups": shape.groups}
        product = table.bind("grouped_linear", facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor], group_end: Tensor) -> Tensor:
            y: Tensor = product(x, stored["weight"], group_end)
            return y

        return multiply


def kv_storage(shape: KVShape, dtype: torch.dtype) -> tuple[Stored, ...]:
    """Keys and values in one dtype, which the core's attention widens as it reads; with the model's own dtype it is
    the built-in KV format.
    """
    sizes = (shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_size)
    return (Stored("keys", sizes, dtype, None, None), Stored("values", sizes, dtype, None, None))
