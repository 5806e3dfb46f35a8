"""Build: everything that model code needs from the engine, passed explicitly instead of read from globals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from plexor.extension.specs import Facts, KVFormat
from plexor.kernels.table import resolve
from plexor.model.format import KVShape, LinearFormat, Stored
from plexor.parallel.mesh import Mesh

if TYPE_CHECKING:
    from plexor.extension.catalog import Catalog
    from plexor.kernels.table import KernelTable


@dataclass(frozen=True, slots=True)
class Build:
    """format: of linear layers and expert stacks; dense: the built-in one, for layers that must stay exact.

    formats: those of a checkpoint whose layers differ, one for each layer in the order in which they are made.
    """

    catalog: Catalog
    table: KernelTable
    mesh: Mesh
    dtype: torch.dtype
    device: torch.device
    format: LinearFormat
    dense: LinearFormat
    kv_format: KVFormat
    formats: Iterator[LinearFormat] | None = None

    def next_format(self) -> LinearFormat:
        """Of the linear layer or expert stack that is being made; asked once for each."""
        return self.format if self.formats is None else next(self.formats)

    def bind(self, op: str, kv_dtype: torch.dtype | None = None, **shape: int) -> Callable[..., Any]:
        """The kernel for an op at these sizes, on this device and in this dtype."""
        return self.table.bind(op, facts(self.device, self.dtype, kv_dtype, **shape))

    def layer(self, slot: str, name: str, config: object) -> torch.nn.Module:
        """Another plugin's layer, found by (slot, name)."""
        module: torch.nn.Module = resolve(self.catalog.layer(slot, name).build)(config, self)
        return module

    def kv_storage(self, shape: KVShape) -> tuple[Stored, ...]:
        """What one layer keeps in the paged cache."""
        stored: tuple[Stored, ...] = resolve(self.kv_format.storage)(shape, self.dtype)
        return stored

    def exact(self) -> Build:
        """The same build with every linear layer dense, for parts that a number format must not touch."""
        return replace(self, format=self.dense, formats=None)


def facts(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None = None, **shape: int) -> Facts:
    """The facts of a call on a torch device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    kind = "cuda" if device.type == "cuda" else "cpu"
    name = None if kv_dtype is None else str(kv_dtype).removeprefix("torch.")
    return Facts(kind, str(dtype).removeprefix("torch."), capability, name, dict(shape))
