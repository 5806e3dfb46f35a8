"""The precision int8_sq: int8 weights and activations with exact integer sums, W8A8 of SmoothQuant.

SmoothQuant (Xiao et al., arXiv 2211.10438) moves outliers of the activations into the weights by a factor for each
input feature, which calibration finds. Without calibration every factor is one: loading a dense checkpoint rounds its
weights as they are, and tokens get their own scale while running. A calibrated checkpoint comes already smoothed, with
the factors folded into the layers before, and is multiplied by the same ops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plexor.api import GroupedMultiply, KernelTable, LinearShape, Multiply, Stored, facts
from plexor_quant.rounding import round_int8


class Int8Format:
    """Keeps "weight" int8 [out, in] and "scale" float32 [out], the row's largest magnitude over 127; a LinearFormat."""

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        return (
            Stored("weight", (shape.out_features, shape.in_features), torch.int8, 0, 1),
            Stored("scale", (shape.out_features,), torch.float32, 0, None),
        )

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        numbers, scale = round_int8(weight)
        return {"weight": numbers, "scale": scale.squeeze(-1)}

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"].float() * stored["scale"].unsqueeze(-1)

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features}
        product = table.bind("int8_linear", facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"])
            return y

        return multiply

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features, "groups": shape.groups}
        product = table.bind("int8_grouped_linear", facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor], group_end: Tensor) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"], group_end)
            return y

        return multiply
