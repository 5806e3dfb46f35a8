"""The precisions sparse24 and sparse24_fp8: half of the weights of models that were trained 2:4, and their places.

The pattern is that of Mishra et al., "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378), which tensor cores
multiply at twice the rate. A weight that does not have it is refused: pruning needs training, not rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plexor.api import Grid, GroupedMultiply, KernelTable, LinearShape, Multiply, Stored, facts
from plexor_quant.rounding import round_e4m3
from plexor_quant.sparse24_layout import compress, index_bytes, num_groups, widen


@dataclass(frozen=True, slots=True)
class Sparse24Format:
    """Keeps "weight" [out, in / 2] in the model's dtype and "index" uint8 [out, ceil(in / 8)]; a LinearFormat."""

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        return _storage(shape, dtype)

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        """ConfigError for a weight that is not 2:4."""
        kept, index = compress(weight)
        return {"weight": kept, "index": index}

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return widen(stored["weight"], stored["index"]).float()

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        product = table.bind("sparse24_linear", facts(device, dtype, None, **_sizes(shape)))

        def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["index"])
            return y

        return multiply

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        product = table.bind(
            "sparse24_grouped_linear", facts(device, dtype, None, **_sizes(shape), groups=shape.groups)
        )

        def multiply(x: Tensor, stored: Mapping[str, Tensor], group_end: Tensor) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["index"], group_end)
            return y

        return multiply


@dataclass(frozen=True, slots=True)
class Sparse24Fp8Format:
    """Keeps "weight" e4m3 [out, in / 2], "scale" float32 [out] and "index" uint8 [out, ceil(in / 8)]; a LinearFormat.

    A scale puts its row's largest magnitude on 448; activations are rounded to e4m3 with a scale for each token.
    """

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        return (*_storage(shape, torch.float8_e4m3fn), Stored("scale", (shape.out_features,), torch.float32, 0, None))

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        """ConfigError for a weight that is not 2:4."""
        kept, index = compress(weight)
        codes, scale = round_e4m3(kept)
        return {"weight": codes, "scale": scale.squeeze(-1), "index": index}

    def takes(self, grid: Grid) -> bool:
        """e4m3 codes with one scale for each row."""
        is_plain = grid.zero_point is None and grid.order is None and grid.factor is None
        return is_plain and grid.codes == torch.float8_e4m3fn and grid.scale.shape[-1] == 1

    def keep(self, grid: Grid) -> dict[str, Tensor]:
        """ConfigError for a weight that is not 2:4."""
        kept, index = compress(grid.numbers.float())
        return {"weight": kept.to(torch.float8_e4m3fn), "scale": grid.scale.squeeze(-1), "index": index}

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return widen(stored["weight"], stored["index"]).float() * stored["scale"].unsqueeze(-1)

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        product = table.bind("sparse24_fp8_linear", facts(device, dtype, None, **_sizes(shape)))

        def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"], stored["index"])
            return y

        return multiply

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        sizes = _sizes(shape) | {"groups": shape.groups}
        product = table.bind("sparse24_fp8_grouped_linear", facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor], group_end: Tensor) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"], stored["index"], group_end)
            return y

        return multiply


def _storage(shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, Stored]:
    return (
        Stored("weight", (shape.out_features, 2 * num_groups(shape.in_features)), dtype, 0, 1),
        Stored("index", (shape.out_features, index_bytes(shape.in_features)), torch.uint8, 0, 1),
    )


def _sizes(shape: LinearShape) -> dict[str, int]:
    return {"out_features": shape.out_features, "in_features": shape.in_features}
