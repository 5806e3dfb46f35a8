"""Parts and shards: what the ranks hold together is the whole layer, and each reads its own share alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plexor.checkpoint.view import SourceView
from plexor.errors import CheckpointError, ConfigError
from plexor.model.build import Build
from plexor.model.feed_forward import FeedForward, FeedForwardConfig, GatedFeedForward
from plexor.model.linear import GroupedLinear, Linear, LinearWeight, Part
from plexor.testing.source import MemorySource

Make = Callable[..., Build]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(layer: LinearWeight, seed: int = 0) -> dict[str, Tensor]:
    """Load a layer from random whole tensors; returns these side by side, groups first where there are several."""
    whole: dict[str, list[Tensor]] = {}
    for part, group, suffix in sorted(layer.pieces(), key=lambda piece: (piece[1], piece[0])):
        size = layer.parts[part].size
        shape = (size, layer.in_features) if suffix == "weight" else (size,)
        tensor = random(*shape, seed=1000 * seed + 100 * part + 10 * group + len(suffix))
        whole.setdefault(suffix, []).append(tensor)
        layer.load_piece((part, group, suffix), SourceView(MemorySource({"tensor": tensor}), "tensor"))
    joined = {suffix: torch.cat(tensors) for suffix, tensors in whole.items()}
    if layer.groups > 1:
        joined["weight"] = joined["weight"].unflatten(0, (layer.groups, -1))
    return joined


def test_the_whole_layer(make: Make) -> None:
    layer = Linear(make(), 8, (Part(3, 4), Part(2)), bias=True)
    whole = fill(layer)
    x = random(5, 8)
    torch.testing.assert_close(layer(x), x @ whole["weight"].T + whole["bias"])
    assert layer(x[:0]).shape == (0, 14)


@pytest.mark.parametrize("size", [2, 4])
def test_column_shards_side_by_side_are_the_whole(make: Make, size: int) -> None:
    parts = (Part(4, 3), Part(8))
    whole = Linear(make(), 8, parts, cut="out", bias=True)
    fill(whole)
    x = random(5, 8)
    shards = [Linear(make(rank, size), 8, parts, cut="out", bias=True) for rank in range(size)]
    for shard in shards:
        fill(shard)
    halves = [shard(x).split((12 // size, 8 // size), dim=-1) for shard in shards]
    joined = torch.cat([torch.cat([half[part] for half in halves], dim=-1) for part in range(2)], dim=-1)
    torch.testing.assert_close(joined, whole(x))


def test_row_shards_sum_to_the_whole(make: Make) -> None:
    whole = Linear(make(), 8, (Part(6),), cut="in", bias=True)
    fill(whole)
    x = random(5, 8)
    total = torch.zeros(5, 6)
    for rank in range(4):
        shard = Linear(make(rank, 4), 8, (Part(6),), cut="in", bias=True)
        bias = fill(shard)["bias"]
        total += shard(x[:, 2 * rank : 2 * rank + 2]) - bias
    torch.testing.assert_close(total + bias, whole(x))


def test_few_units_are_held_by_neighbours_together(make: Make) -> None:
    parts = (Part(8, 2), Part(2, 2, replicate=True))
    for rank in range(4):
        shard = Linear(make(rank, 4), 8, parts, cut="out")
        whole = fill(shard)["weight"]
        queries, keys = whole[4 * rank : 4 * rank + 4], whole[16 + 2 * (rank // 2) :][:2]
        assert torch.equal(shard.stored["weight"], torch.cat((queries, keys)))


def test_units_that_do_not_divide_are_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="tensor parallel 4 does not divide the model's 6 attention heads"):
        Linear(make(0, 4), 8, (Part(6, 2, "attention heads"),), cut="out")
    with pytest.raises(ConfigError, match="tensor parallel 4 is not a multiple of the model's 3 heads"):
        Linear(make(0, 4), 8, (Part(3, 2, "heads", replicate=True),), cut="out")
    with pytest.raises(ConfigError, match="input features"):
        Linear(make(0, 3), 8, (Part(6),), cut="in")


def test_a_rank_reads_its_share_alone(make: Make) -> None:
    layer = Linear(make(1, 2), 8, (Part(6),), cut="out")
    source = MemorySource({"tensor": random(6, 8)})
    layer.load_piece((0, 0, "weight"), SourceView(source, "tensor"))
    assert source.reads == [("tensor", (slice(3, 6), slice(0, 8)))]


@pytest.mark.parametrize("cut", ["out", "in"])
def test_expert_stacks_are_sharded_like_layers(make: Make, cut: str) -> None:
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    x = random(7, 8)
    whole = GroupedLinear(make(), 8, (Part(4), Part(4)), groups=3)
    weight = fill(whole)["weight"]
    expected = torch.cat((x[:2] @ weight[0].T, x[2:] @ weight[2].T))
    torch.testing.assert_close(whole(x, ends), expected)
    shards = [
        GroupedLinear(make(rank, 2), 8, (Part(4), Part(4)), groups=3, cut="out" if cut == "out" else "in")
        for rank in range(2)
    ]
    for shard in shards:
        fill(shard)
    if cut == "in":
        total = sum((shard(x[:, 4 * rank : 4 * rank + 4], ends) for rank, shard in enumerate(shards)), torch.zeros(()))
        torch.testing.assert_close(total, expected)
    else:
        (gate_0, up_0), (gate_1, up_1) = (shard(x, ends).chunk(2, dim=-1) for shard in shards)
        torch.testing.assert_close(torch.cat((gate_0, gate_1, up_0, up_1), dim=-1), expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "gelu_new"])
def test_feed_forward_layers_sum_over_the_ranks(make: Make, activation: str) -> None:
    config = FeedForwardConfig(8, 12, activation)
    x = random(5, 8)
    for kind in (GatedFeedForward, FeedForward):
        layers = [kind(make(rank, size), config) for rank, size in ((0, 1), (0, 3), (1, 3), (2, 3))]
        for layer in layers:
            for seed, module in enumerate(module for module in layer.modules() if isinstance(module, Linear)):
                fill(module, seed)
        whole, *shards = (layer(x) for layer in layers)
        torch.testing.assert_close(sum(shards, torch.zeros(())), whole)
        assert float(whole.abs().max()) > 0.1


def test_an_unknown_activation_is_refused_with_those_that_are_known(make: Make) -> None:
    with pytest.raises(CheckpointError, match=r"'gelato'.*gelu"):
        FeedForward(make(), FeedForwardConfig(8, 12, "gelato"))
