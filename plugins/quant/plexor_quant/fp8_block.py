"""The precision fp8_block: e4m3 weights with a scale for each block of them, e4m3 activations in groups.

The blocks of 128 x 128 weights and the groups of 128 activations of a token are those of DeepSeek-V3 (arXiv 2412.19437,
section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from plexor.api import Grid, GroupedMultiply, KernelTable, LinearShape, Multiply, Stored, facts
from plexor_quant.kernels.reference.fp8_block_linear import widen_blocks
from plexor_quant.packing import num_groups, spread
from plexor_quant.rounding import E4M3_MAX, SMALLEST_SCALE, to_e4m3


@dataclass(frozen=True, slots=True)
class Fp8BlockFormat:
    """Keeps "weight" e4m3 [out, in] and "scale" float32 [ceil(out / rows), ceil(in / group_size)]; a LinearFormat.

    rows: output features that share a scale; parts of a layer must be whole multiples of it, so that dense weights are
    rounded with 1. group_size: input features that share a scale, in the weight and in each token.
    """

    rows: int = 1
    group_size: int = 128

    def __str__(self) -> str:
        return f"fp8 in blocks of {self.rows} x {self.group_size}"

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        blocks = num_groups(shape.out_features, self.rows), num_groups(shape.in_features, self.group_size)
        return (
            Stored("weight", (shape.out_features, shape.in_features), torch.float8_e4m3fn, 0, 1),
            Stored("scale", blocks, torch.float32, 0, 1, self.rows),
        )

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        out, size = weight.shape[-2:]
        over = -out % self.rows, -size % self.group_size
        padded = functional.pad(weight.float(), (0, over[1], 0, over[0]))
        blocks = padded.unflatten(-1, (-1, self.group_size)).unflatten(-3, (-1, self.rows))
        scale = (blocks.abs().amax(dim=(-3, -1)) / E4M3_MAX).clamp_min(SMALLEST_SCALE)
        wide = spread(scale.repeat_interleave(self.rows, dim=-2)[..., :out, :], size, self.group_size)
        return {"weight": to_e4m3(weight.float() / wide), "scale": scale}

    def takes(self, grid: Grid) -> bool:
        """e4m3 codes without zero points, in groups of this size, with the same scale in the rows of each block."""
        is_plain = grid.zero_point is None and grid.order is None and grid.factor is None
        if not is_plain or grid.codes != torch.float8_e4m3fn or grid.group_size != self.group_size:
            return False
        firsts = grid.scale[:: self.rows].repeat_interleave(self.rows, dim=0)[: grid.scale.shape[0]]
        return torch.equal(firsts, grid.scale)

    def keep(self, grid: Grid) -> dict[str, Tensor]:
        return {"weight": grid.numbers, "scale": grid.scale[:: self.rows]}

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return widen_blocks(stored["weight"], stored["scale"], self.rows, self.group_size)

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features}
        sizes |= {"block_rows": self.rows, "group_size": self.group_size}
        product = table.bind("fp8_block_linear", facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"], self.rows, self.group_size)
            return y

        return multiply

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features, "groups": shape.groups}
        sizes |= {"block_rows": self.rows, "group_size": self.group_size}
        product = table.bind("fp8_block_grouped_linear", facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor], group_end: Tensor) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"], self.rows, self.group_size, group_end)
            return y

        return multiply
