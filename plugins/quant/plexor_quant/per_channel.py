"""What fp8 and int8_sq share: one number for each weight, and one float32 scale for each output channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plexor.api import Fusion, Grid, GroupedMultiply, KernelTable, LinearShape, Multiply, Stored, facts
from plexor_quant.fusions import fused_ops


def dynamic(op: str) -> str:
    """The op that gives each token a scale, for one that takes one for all."""
    return op.replace("_static", "")


def described(op: str, input_scale: float | None) -> str:
    """What `plexor explain` calls a format with this op."""
    name = dynamic(op).removesuffix("_linear")
    return name if input_scale is None else f"{name}, static scale of the inputs"


@dataclass(frozen=True, slots=True)
class PerChannelFormat:
    """Keeps "weight" [out, in] in `dtype` and "scale" float32 [out]; a LinearFormat.

    round_rows: x [..., n] -> numbers [..., n] in `dtype`, scale float32 [..., 1]. op and grouped_op take the
    activations as they are and round them themselves: each token with its own scale or, with input_scale, all with
    that one, which these ops take behind the weight's.
    """

    dtype: torch.dtype
    round_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    op: str
    grouped_op: str
    input_scale: float | None = None

    def __str__(self) -> str:
        return described(self.op, self.input_scale)

    @property
    def fused(self) -> Mapping[Fusion, str]:
        """Ops that do more than multiply, without the input_scale: a token then has its own or stays as it is."""
        return fused_ops(dynamic(self.op))

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        return (
            Stored("weight", (shape.out_features, shape.in_features), self.dtype, 0, 1),
            Stored("scale", (shape.out_features,), torch.float32, 0, None),
        )

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        numbers, scale = self.round_rows(weight)
        return {"weight": numbers, "scale": scale.squeeze(-1)}

    def takes(self, grid: Grid) -> bool:
        """One scale for each row, no zero points, and codes of this very dtype or, for int8, of fewer bits."""
        is_plain = grid.zero_point is None and grid.order is None and grid.factor is None
        return is_plain and grid.codes == self.dtype and grid.scale.shape[-1] == 1

    def keep(self, grid: Grid) -> dict[str, Tensor]:
        return {"weight": grid.numbers, "scale": grid.scale.squeeze(-1)}

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"].float() * stored["scale"].unsqueeze(-1)

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features}
        inputs = () if self.input_scale is None else (self.input_scale,)
        product = table.bind(self.op, facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"], *inputs)
            return y

        return multiply

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        sizes = {"out_features": shape.out_features, "in_features": shape.in_features, "groups": shape.groups}
        inputs = () if self.input_scale is None else (self.input_scale,)
        product = table.bind(self.grouped_op, facts(device, dtype, None, **sizes))

        def multiply(x: Tensor, stored: Mapping[str, Tensor], group_end: Tensor) -> Tensor:
            y: Tensor = product(x, stored["weight"], stored["scale"], *inputs, group_end)
            return y

        return multiply
