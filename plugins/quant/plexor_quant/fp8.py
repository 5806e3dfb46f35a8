"""The precision fp8: e4m3 weights and activations, rounded plainly while loading and while running.

The number format is E4M3 of Micikevicius et al., "FP8 formats for deep learning" (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plexor.api import GroupedMultiply, KernelTable, LinearShape, Multiply, Stored, facts
from plexor_quant.rounding import round_e4m3


class Fp8Format:
    """Keeps "weight" e4m3 [out, in] and "scale" float32 [out], the row's largest magnitude over 448; a LinearFormat."""

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        return (
            Stored("weight", (shape.out_features, shape.in_features), torch.float8_e4m3fn, 0, 1),
            Stored("scale", (shape.out_features,), torch.float32, 0, None),
        )

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scale = round_e4m3(weight)
        return {"weight": codes, "scale": scale.squeeze(-1)}

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"].float() * stored["scale"].unsqueeze(-1)

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features}
        product = table.bind("fp8_linear", facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"])
            return y

        return multiply

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features, "groups": shape.groups}
        product = table.bind("fp8_grouped_linear", facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor], group_end: Tensor) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"], group_end)
            return y

        return multiply
