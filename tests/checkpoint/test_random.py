"""Random weights fill every place of a model, through its number format, and are the same on every rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plexor.checkpoint.random import draw_weights
from plexor.extension.catalog import Catalog
from plexor.model.build import Build
from plexor.model.embedding import PositionEmbedding, VocabEmbedding
from plexor.model.linear import GroupedLinear, Linear, Part
from plexor.model.norm import RMSNorm
from plexor.parallel.mesh import Mesh
from plexor.runtime.loading import Placement, make_build

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """Each kind of place: 5 rows of vocabulary leave the last of four ranks without any."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.words = VocabEmbedding(build, 5, 12)
        self.places = PositionEmbedding(build, 9, 12)
        self.up = Linear(build, 12, (Part(20), Part(20)), cut="out", bias=True)
        self.experts = GroupedLinear(build, 12, (Part(8),), groups=3)
        self.down = Linear(build, 20, (Part(12),), cut="in")
        self.norm = RMSNorm(build, 12, 1e-6)


def drawn(mesh: Mesh = Mesh(), dtype: torch.dtype = torch.float32, seed: int = 3) -> Mixed:
    catalog = Catalog.load(allow=frozenset())
    build = make_build(catalog, catalog.kernel_table(), Placement(CPU, dtype, mesh=mesh))
    mixed = Mixed(build)
    for tensor in (*mixed.parameters(), *mixed.buffers()):
        tensor.fill_(float("nan"))
    mixed.words.weight.zero_()  # its padding stays
    draw_weights(mixed, dtype, CPU, seed)
    return mixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_place_is_filled(dtype: torch.dtype) -> None:
    mixed = drawn(dtype=dtype)
    for name, tensor in (*mixed.named_parameters(), *mixed.named_buffers()):
        expected = (1.0, 0.1) if tensor.dim() == 1 else (0.0, 0.02)
        assert tensor.isfinite().all(), name
        assert tensor.float().mean().item() == pytest.approx(expected[0], abs=expected[1]), name
        assert tensor.float().std().item() == pytest.approx(expected[1], rel=0.5), name


def test_no_two_places_are_alike_and_seeds_decide() -> None:
    mixed, again, other = drawn(), drawn(), drawn(seed=400)
    gate, up = mixed.up.stored["weight"].split(20)
    assert not torch.equal(gate, up)
    assert not torch.equal(mixed.experts.stored["weight"][0], mixed.experts.stored["weight"][2])
    for name, tensor in mixed.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])


def test_ranks_hold_shares_of_one_model() -> None:
    whole, ranks = drawn(), [drawn(Mesh(rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat([rank.words.weight for rank in ranks])[:5], whole.words.weight)
    assert torch.equal(torch.cat([rank.down.stored["weight"] for rank in ranks], dim=1), whole.down.stored["weight"])
    gate, up = whole.up.stored["weight"].split(20)
    assert whole.up.bias is not None
    for index, rank in enumerate(ranks):
        rows = slice(5 * index, 5 * index + 5)
        assert torch.equal(rank.up.stored["weight"], torch.cat((gate[rows], up[rows])))
        assert rank.up.bias is not None
        assert torch.equal(rank.up.bias, torch.cat([part[rows] for part in whole.up.bias.split(20)]))
        assert torch.equal(rank.norm.weight, whole.norm.weight)
        assert torch.equal(rank.experts.stored["weight"], whole.experts.stored["weight"])


def test_the_report_counts_what_was_drawn() -> None:
    report = draw_weights(drawn(), torch.bfloat16, CPU, seed=0)
    numbers = 5 * 12 + 9 * 12 + 40 * 12 + 40 + 3 * 8 * 12 + 12 * 20 + 12
    assert (report.num_tensors, report.num_ignored, report.num_bytes) == (11, 0, 2 * numbers)
    assert report.dtypes == ("bfloat16",)
