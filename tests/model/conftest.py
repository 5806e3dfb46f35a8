"""Builds for one rank of several without processes: collectives give back what they got, and the tests add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from plexor.extension.catalog import Catalog
from plexor.model.build import Build
from plexor.parallel.mesh import Mesh
from plexor.runtime.loading import Placement, make_build


@dataclass(frozen=True, slots=True)
class LonelyMesh(Mesh):
    """A rank whose partners are played by the test."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="session")
def make() -> Callable[..., Build]:
    """(rank, size, dtype) to a Build on the CPU with the core's own parts alone."""
    catalog = Catalog.load(allow=frozenset())
    table = catalog.kernel_table()

    def made(rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> Build:
        placement = Placement(torch.device("cpu"), dtype, mesh=LonelyMesh(rank, size))
        return make_build(catalog, table, placement)

    return made
