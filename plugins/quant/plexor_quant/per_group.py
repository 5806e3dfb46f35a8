"""What w4a_fp8 and int4_wo share: 4-bit weights in groups of input features, and one bfloat16 scale for each group.

Without zero points numbers run from -7 to 7. Leaving out -8 keeps the grid symmetric, so that the largest magnitude of
a group is met exactly whichever its sign; checkpoints may hold it. With zero points they are the sixteen from a group's
smallest weight to its largest. Scales are bfloat16: an eighth of a bit for each weight instead of float32's quarter,
and unlike float16 no weight of a float32 or bfloat16 checkpoint takes them out of range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plexor.api import Fusion, Grid, GroupedMultiply, KernelTable, LinearShape, Multiply, Stored, facts
from plexor_quant.fusions import fused_ops
from plexor_quant.packing import ZERO, is_odd, num_groups, pack, round_int4, round_uint4, widen
from plexor_quant.per_channel import described, dynamic


@dataclass(frozen=True, slots=True)
class PerGroupFormat:
    """Keeps "weight" uint8 [out, ceil(in / 2)], "scale" bfloat16 [out, ceil(in / group_size)]; a LinearFormat.

    group_size: consecutive input features that share a scale, even; a row's last group may be shorter. None: all of a
    row's, that is a scale for each output channel. zero_points: whether there is also "zero" uint8, of scale's shape,
    the nibble from 0 to 15 that means zero. op and grouped_op take the activations as they are, the group size behind
    the scale, then input_scale where it is given, the one scale for all inputs, and "zero" or None last.
    """

    group_size: int | None
    op: str
    grouped_op: str
    zero_points: bool = False
    input_scale: float | None = None

    def __str__(self) -> str:
        groups = "of whole rows" if self.group_size is None else f"of {self.group_size}"
        zero = ", zero points" if self.zero_points else ""
        return f"{described(self.op, self.input_scale)}, groups {groups}{zero}"

    @property
    def fused(self) -> Mapping[Fusion, str]:
        """Ops that do more than multiply, which tell the group size by the number of scales: a power of two, or all.

        They know of no input_scale: each token then has its own or stays as it is.
        """
        size = self.group_size
        return fused_ops(dynamic(self.op)) if size is None or size & (size - 1) == 0 else {}

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        groups = shape.out_features, num_groups(shape.in_features, self._size(shape.in_features))
        along = None if self.group_size is None else 1
        kept = (
            Stored("weight", (shape.out_features, (shape.in_features + 1) // 2), torch.uint8, 0, 1),
            Stored("scale", groups, torch.bfloat16, 0, along),
        )
        return (*kept, Stored("zero", groups, torch.uint8, 0, along)) if self.zero_points else kept

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        size = self._size(weight.shape[-1])
        if self.zero_points:
            packed, scale, zero = round_uint4(weight, size)
            return {"weight": packed, "scale": scale, "zero": zero}
        packed, scale = round_int4(weight, size)
        return {"weight": packed, "scale": scale}

    def takes(self, grid: Grid) -> bool:
        """Codes from -8 to 7, without zero points or of a format that has them, whose groups are wholes of these."""
        if grid.codes != torch.int8 or grid.bits > 4 or grid.order is not None or grid.factor is not None:
            return False
        if grid.zero_point is not None and not self.zero_points:
            return False
        if self.group_size is None or grid.scale.shape[-1] == 1:
            return grid.scale.shape[-1] == 1
        return grid.group_size % self.group_size == 0

    def keep(self, grid: Grid) -> dict[str, Tensor]:
        """Codes stay and may be -8 here; scales become bfloat16, which those of float16 or float32 are rounded to."""
        in_features = grid.numbers.shape[-1]
        groups = torch.arange(0, in_features, self._size(in_features), device=grid.numbers.device) // grid.group_size
        kept = {"weight": pack(grid.numbers), "scale": grid.scale[:, groups].to(torch.bfloat16)}
        if self.zero_points:
            zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
            kept["zero"] = (zero[:, groups] + ZERO).to(torch.uint8)
        return kept

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        packed = stored["weight"]
        in_features = 2 * packed.shape[-1] - is_odd(packed)
        return widen(packed, stored["scale"], in_features, self._size(in_features), stored.get("zero"))

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        group_size = self._size(shape.in_features)
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features} | self._facts(group_size)
        inputs = () if self.input_scale is None else (self.input_scale,)
        product = table.bind(self.op, facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"], group_size, *inputs, stored.get("zero"))
            return y

        return multiply

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        group_size = self._size(shape.in_features)
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features, "groups": shape.groups}
        sizes |= self._facts(group_size)
        inputs = () if self.input_scale is None else (self.input_scale,)
        product = table.bind(self.grouped_op, facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor], group_end: Tensor) -> Tensor:
            y: Tensor = product(
                x, stored["weight"], stored["scale"], group_size, *inputs, group_end, stored.get("zero")
            )
            return y

        return multiply

    def _facts(self, group_size: int) -> dict[str, int]:
        """What kernels are chosen on besides the sizes of the layer; zero_points is 1 where there are any."""
        return {"group_size": group_size} | ({"zero_points": 1} if self.zero_points else {})

    def _size(self, in_features: int) -> int:
        return in_features if self.group_size is None else self.group_size
