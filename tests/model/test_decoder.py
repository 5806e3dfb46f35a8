"""The decoder stack: how residuals run, what embedding does with media, and attention shared out between ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from plexor.batch import Batch, ForwardContext, LogitRows, MediaRows, Pages
from plexor.checkpoint.loader import load_weights
from plexor.checkpoint.mapping import Rule
from plexor.model.attention import Attention, AttentionConfig, RotaryTables
from plexor.model.build import Build
from plexor.model.decoder import Decoder, DecoderConfig, DecoderLayer, Residual, Slots
from plexor.model.format import KVShape
from plexor.model.norm import LayerNorm
from plexor.model.rotary import Rotary
from plexor.testing.source import MemorySource

Make = Callable[..., Build]
HIDDEN, HEAD_SIZE, LENGTH = 12, 8, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def context(caches: tuple[dict[str, Tensor], ...], logit_rows: LogitRows | None = None) -> ForwardContext:
    """One sequence of LENGTH tokens in block 1."""
    pages = Pages(
        query_start=torch.tensor([0, LENGTH], dtype=torch.int32),
        kv_length=torch.tensor([LENGTH], dtype=torch.int32),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        max_query=LENGTH,
    )
    return ForwardContext(pages, torch.arange(8, 8 + LENGTH), logit_rows, caches)


def cache_for(build: Build, shape: KVShape) -> dict[str, Tensor]:
    return {stored.name: torch.zeros(stored.shape, dtype=stored.dtype) for stored in build.kv_storage(shape)}


class Stub(nn.Module):
    """A layer that is a plain function of its first argument."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self._function(x)


class StubAttention(Stub):
    """One that is in a residual too."""

    def as_residual(self, build: Build, norm: nn.Module) -> Callable[..., Tensor]:
        return lambda x, *_: x + self(norm(x))


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        # attention doubles, feed-forward squares, the first norm adds 1, the second triples
        ("sequential", lambda x: (y := x + 2 * (x + 1)) + (3 * y) ** 2),
        ("parallel", lambda x: x + 2 * (x + 1) + (3 * x) ** 2),
        ("norm_after", lambda x: 3 * ((y := x + 2 * x + 1) + y**2)),
    ],
)
def test_residuals(make: Make, residual: Residual, expected: Callable[[Tensor], Tensor]) -> None:
    norms = (Stub(lambda x: x + 1), Stub(lambda x: 3 * x))
    attention: nn.Module = StubAttention(lambda x: 2 * x)
    layer = DecoderLayer(make(), attention, Stub(torch.square), norms, residual)  # type: ignore[arg-type]
    x = random(4, HIDDEN)
    torch.testing.assert_close(layer(x, torch.zeros(4), context(())), expected(x))


def attention_config(rotary: Rotary | None = None) -> AttentionConfig:
    return AttentionConfig(
        hidden_size=HIDDEN, num_heads=12, num_kv_heads=2, head_size=HEAD_SIZE, scale=0.3, rotary=rotary, qkv_bias=True
    )


@pytest.mark.parametrize("rotary", [None, Rotary(HEAD_SIZE, 100.0, 16), Rotary(4, 100.0, 16)])
@pytest.mark.parametrize(("size", "window", "eps"), [(2, None, None), (4, 3, 1e-6)])
def test_attention_sums_over_the_ranks(
    make: Make, rotary: Rotary | None, size: int, window: int | None, eps: float | None
) -> None:
    """With 4 ranks, two neighbours hold the same one of the two KV heads."""
    config = replace(attention_config(rotary), window=window, qk_norm_eps=eps)
    tensors = {
        "q.weight": random(12 * HEAD_SIZE, HIDDEN, seed=1),
        "q.bias": random(12 * HEAD_SIZE, seed=2),
        "k.weight": random(2 * HEAD_SIZE, HIDDEN, seed=3),
        "k.bias": random(2 * HEAD_SIZE, seed=4),
        "v.weight": random(2 * HEAD_SIZE, HIDDEN, seed=5),
        "v.bias": random(2 * HEAD_SIZE, seed=6),
        "out.weight": random(HIDDEN, 12 * HEAD_SIZE, seed=7),
    }
    if eps is not None:
        tensors |= {"q_norm.weight": random(HEAD_SIZE, seed=8), "k_norm.weight": random(HEAD_SIZE, seed=9)}
    rules = (
        *(Rule(name, "qkv", part=part) for part, name in enumerate("qkv")),
        *(Rule(name, name) for name in ("out", "q_norm", "k_norm")),
    )
    x, positions = random(LENGTH, HIDDEN), torch.arange(LENGTH)

    def attended(build: Build) -> Tensor:
        tables = None if rotary is None else RotaryTables(rotary, 16, build.device)
        layer = Attention(build, config, 0, tables)
        load_weights(layer, rules, MemorySource(tensors))
        assert layer.num_heads == 12 // build.mesh.size
        y: Tensor = layer(x, positions, context((cache_for(build, layer.kv_shape(2, 8)),)))
        return y

    whole = attended(make())
    shards = [attended(make(rank, size)) for rank in range(size)]
    torch.testing.assert_close(sum(shards, torch.zeros(())), whole, rtol=1e-4, atol=1e-4)
    assert float(whole.std()) > 0.1


def alone(rows: Tensor) -> LogitRows:
    """Rows of the sequence of `context`, each of which sees itself and those before."""
    count = len(rows)
    starts, lengths = torch.arange(count + 1, dtype=torch.int32), (rows + 1).to(torch.int32)
    table = torch.ones(count, 1, dtype=torch.int32)
    return LogitRows(rows, Pages(starts, lengths, table, max_query=1, num_decodes=count))


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("residual", ["sequential", "parallel", "norm_after"])
@pytest.mark.parametrize("rows", [[], [4], [3, 0]])
def test_only_rows_with_logits_leave_the_last_layer(
    make: Make, residual: Residual, rows: list[int], window: int | None
) -> None:
    build = make()
    attention = replace(attention_config(Rotary(4, 100.0, 16)), window=window)
    model = decoder(build, residual=residual, attention=(attention, attention))
    batch = Batch(torch.tensor([1, 2, 3, 4, 5]), torch.arange(LENGTH))

    def forwarded(chosen: LogitRows | None) -> tuple[Tensor, tuple[dict[str, Tensor], ...]]:
        caches = tuple(cache_for(build, shape) for shape in model.kv_shapes(2, 8))
        return model.forward(batch, context(caches, chosen)), caches

    chosen = torch.tensor(rows, dtype=torch.int64)
    every, caches = forwarded(None)
    some, same_caches = forwarded(alone(chosen))
    assert every.shape == (LENGTH, HIDDEN)
    torch.testing.assert_close(some, every[chosen])
    for cache, same_cache in zip(caches, same_caches, strict=True):
        torch.testing.assert_close(cache, same_cache)


def decoder(build: Build, **changes: object) -> Decoder:
    config = DecoderConfig(
        vocab_size=9,
        max_positions=16,
        hidden_size=HIDDEN,
        attention=(attention_config(), attention_config()),
        tied_head=True,
    )
    slots = Slots(feed_forward=lambda _: Stub(torch.tanh), norm=lambda size: LayerNorm(build, size, 1e-5))
    model = Decoder(build, replace(config, **changes), slots)  # type: ignore[arg-type]
    with torch.no_grad():
        for seed, tensor in enumerate([*model.parameters(), *model.buffers()]):
            tensor.copy_(random(*tensor.shape, seed=seed))
    return model


def test_media_take_the_place_of_their_tokens_before_positions_are_added(make: Make) -> None:
    model = decoder(make(), learned_positions=16, position_offset=2, embedding_size=7)
    assert model.project_in is not None
    assert model.positions is not None
    ids, positions, media = torch.tensor([3, 8, 8, 1]), torch.arange(4) + 5, random(2, HIDDEN, seed=99)
    batch = Batch(ids, positions, (MediaRows(torch.tensor([1]), media[:1]), MediaRows(torch.tensor([2]), media[1:])))
    words = model.project_in(model.embedding(ids))
    expected = torch.stack((words[0], media[0], media[1], words[3])) + model.positions(positions)
    torch.testing.assert_close(model.embed(batch), expected)


def test_embedding_media_leaves_the_table_as_it_is(make: Make) -> None:
    model = decoder(make())
    before = model.embedding.weight.clone()
    model.embed(Batch(torch.tensor([0, 1]), torch.arange(2), (MediaRows(torch.tensor([0]), random(1, HIDDEN)),)))
    assert torch.equal(model.embedding.weight, before)


def test_the_head_is_the_embedding_or_its_own(make: Make) -> None:
    tied, untied = decoder(make()), decoder(make(), tied_head=False)
    hidden = random(2, HIDDEN)
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embedding.weight.T)
    assert untied.head is not None
    torch.testing.assert_close(untied.logits(hidden), hidden @ untied.head.weight.T)


def test_layers_that_rotate_alike_share_one_table(make: Make) -> None:
    one, two = Rotary(HEAD_SIZE, 100.0, 16), Rotary(HEAD_SIZE, 1000.0, 16)
    model = decoder(make(), attention=tuple(attention_config(rotary) for rotary in (one, two, one)))
    tables = [layer.attention._tables[0] for layer in model.layers]  # type: ignore[union-attr,index]
    assert tables[0] is tables[2]
    assert tables[0] is not tables[1]


def test_each_layer_keeps_its_own_part_of_the_cache(make: Make) -> None:
    build = make()
    model = decoder(build)
    shapes = model.kv_shapes(2, 8)
    assert shapes == (KVShape(2, 8, 2, HEAD_SIZE),) * 2
    caches = tuple(cache_for(build, shape) for shape in shapes)
    hidden = model.forward(Batch(torch.tensor([1, 2, 3, 4, 5]), torch.arange(LENGTH)), context(caches))
    assert hidden.shape == (LENGTH, HIDDEN)
    keys = [cache["keys"] for cache in caches]
    assert not torch.equal(*keys)
    assert all(bool((key[0] == 0).all()) and bool((key[1, :LENGTH] != 0).all()) for key in keys)
