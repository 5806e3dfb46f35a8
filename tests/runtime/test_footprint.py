"""What a step takes, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from plexor import EngineConfig
from plexor.checkpoint.folder import open_folder
from plexor.errors import CapacityError
from plexor.extension.catalog import Catalog
from plexor.model.linear import GroupedLinear, Linear, Part
from plexor.parallel.mesh import Mesh
from plexor.runtime.footprint import LOGPROB_BYTES, activation_bytes, check_tables, graph_bytes, table_bytes, widest
from plexor.runtime.loading import Placement, make_build, plan_model
from plexor.runtime.ranks import step_bytes


def test_a_layer_is_as_wide_as_two_linear_layers_and_the_stream_twice(tiny: Path) -> None:
    """Attention: 8 + 2 + 2 heads of 24 are projected and 192 features return; feed-forward: 104, then 52."""
    catalog = Catalog.load()
    built = plan_model(EngineConfig(device="cpu"), catalog, catalog.kernel_table(), open_folder(tiny))
    assert widest(built.module) == 2 * 40 + 12 * 24 + 192
    assert activation_bytes(built, 1000, 3) == 1000 * 560 * 4
    assert activation_bytes(built, 10, 100) == 100 * 301 * (4 + LOGPROB_BYTES)
    assert graph_bytes(built, 8, 5) - graph_bytes(built, 7, 5) == 560 * 4
    assert graph_bytes(built, 8, 5) - graph_bytes(built, 8, 4) == 301 * 4
    assert table_bytes(16, 8) == 2 * 4 * 16 * 8
    config = EngineConfig(device="cpu", max_sequences=16, max_step_tokens=500)
    assert step_bytes(config, built, 128) == 500 * 560 * 4 + table_bytes(16, 8)


def test_tables_that_no_machine_holds_are_refused() -> None:
    with pytest.raises(CapacityError, match=r"1,048,576 sequences .* lower --max-sequences"):
        check_tables(2**20, 2**17, 2**39)
    check_tables(2**20, 2**17, 2**40)


def test_experts_count_for_each_that_a_token_visits() -> None:
    catalog = Catalog.load(allow=frozenset())
    build = make_build(catalog, catalog.kernel_table(), Placement(torch.device("cpu"), torch.float32, mesh=Mesh()))
    stack = nn.Module()
    stack.up = GroupedLinear(build, 10, (Part(7), Part(7)), groups=5, rows_per_token=3)
    stack.down = GroupedLinear(build, 7, (Part(10),), groups=5, rows_per_token=3)
    assert widest(stack) == 2 * 10 + 3 * (10 + 14 + 7)
    router = nn.Module()
    router.linear = Linear(build, 10, (Part(6),))
    assert widest(router) == 2 * 6 + 10 + 6
