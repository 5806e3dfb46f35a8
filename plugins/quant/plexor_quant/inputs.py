"""What some checkpoints ask of a layer's inputs before the product: another order, or a factor for each feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plexor.api import (
    Grid,
    GroupedMultiply,
    KernelTable,
    LinearShape,
    Multiply,
    Stored,
)
from plexor_quant.kernels.torch.groups import group_of_row
from plexor_quant.per_group import PerGroupFormat


@dataclass(frozen=True, slots=True)
class InputsFormat:
    """Keeps what `base` keeps of a weight whose columns are sorted and divided, and how; a LinearFormat.

    ordered: keeps "order" int32 [in]: `base` has column order[i] of the weight as its column i, so that groups which
    GPTQ's activation order scatters are of consecutive columns again. factored: keeps "factor" float32 [in], before
    sorting: `base` has the weight divided by it, and inputs are multiplied by it, as AWQ's scales are where they could
    not be folded into the layer before. There is no fused op for either.
    """

    base: PerGroupFormat
    ordered: bool = False
    factored: bool = False

    def __str__(self) -> str:
        asked = ((self.ordered, "inputs in activation order"), (self.factored, "inputs with factors"))
        return ", ".join((str(self.base), *(text for is_asked, text in asked if is_asked)))

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        order = (Stored("order", (shape.in_features,), torch.int32, None, 0),) if self.ordered else ()
        factor = (Stored("factor", (shape.in_features,), torch.float32, None, 0),) if self.factored else ()
        return (*self.base.storage(shape, dtype), *order, *factor)

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        """A dense weight stays in order and has no factors."""
        size = *weight.shape[:-2], weight.shape[-1]
        order = torch.arange(size[-1], dtype=torch.int32, device=weight.device).expand(size)
        return self._with(self.base.convert(weight), order, torch.ones(size, device=weight.device))

    def takes(self, grid: Grid) -> bool:
        """What the base takes once it is sorted and without factors; only with what this format keeps."""
        fits = (self.ordered, self.factored) == (grid.order is not None, grid.factor is not None)
        return fits and self.base.takes(replace(grid, order=None, factor=None))

    def keep(self, grid: Grid) -> dict[str, Tensor]:
        numbers = grid.numbers if grid.order is None else grid.numbers[:, grid.order]
        kept = self.base.keep(replace(grid, numbers=numbers, order=None, factor=None))
        return self._with(kept, None if grid.order is None else grid.order.int(), grid.factor)

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**self.base.load(stored), **{name: stored[name] for name in ("order", "factor") if name in stored}}

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        weight = self.base.dense(stored)
        if self.ordered:
            places = stored["order"].long().unsqueeze(-2).expand_as(weight)
            weight = torch.empty_like(weight).scatter_(-1, places, weight)
        return weight * stored["factor"].unsqueeze(-2) if self.factored else weight

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        product = self.base.bind(table, shape, dtype, device)

        def multiply(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
            if self.factored:
                x = (x * stored["factor"]).to(x.dtype)
            return product(x.index_select(1, stored["order"]) if self.ordered else x, stored)

        return multiply

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        product = self.base.bind_grouped(table, shape, dtype, device)

        def multiply(x: Tensor, stored: Mapping[str, Tensor], group_end: Tensor) -> Tensor:
            owner = group_of_row(x.shape[0], group_end).clamp_max(shape.groups - 1)
            if self.factored:
                x = (x * stored["factor"][owner]).to(x.dtype)
            return product(x.gather(1, stored["order"][owner].long()) if self.ordered else x, stored, group_end)

        return multiply

    def _with(self, kept: dict[str, Tensor], order: Tensor | None, factor: Tensor | None) -> dict[str, Tensor]:
        if self.ordered and order is not None:
            kept["order"] = order
        if self.factored and factor is not None:
            kept["factor"] = factor
        return kept
