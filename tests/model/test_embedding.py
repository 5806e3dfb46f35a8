"""The vocabulary shared out between ranks: together they look up and score as one rank does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from plexor.checkpoint.view import SourceView
from plexor.errors import CheckpointError
from plexor.model.build import Build
from plexor.model.embedding import PositionEmbedding, VocabEmbedding
from plexor.testing.source import MemorySource

Make = Callable[..., Build]
HIDDEN = 6


def loaded(build: Build, vocab_size: int) -> VocabEmbedding:
    table = torch.randn(vocab_size, HIDDEN, generator=torch.Generator().manual_seed(0))
    embedding = VocabEmbedding(build, vocab_size, HIDDEN)
    embedding.load_piece((0, 0, "weight"), SourceView(MemorySource({"table": table}), "table"))
    return embedding


@pytest.mark.parametrize(("vocab_size", "size"), [(307, 1), (307, 2), (307, 4), (8, 4), (5, 4)])
def test_shards_together_are_the_whole(make: Make, vocab_size: int, size: int) -> None:
    ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, 0])
    rows = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    whole = loaded(make(), vocab_size)
    shards = [loaded(make(rank, size), vocab_size) for rank in range(size)]
    found = torch.stack([shard(ids) for shard in shards])
    assert torch.equal(found.sum(dim=0), whole(ids))
    scores = torch.cat([shard.logits(rows) for shard in shards], dim=-1)[:, :vocab_size]
    torch.testing.assert_close(scores, whole.logits(rows))
    assert whole.logits(rows).shape == (3, vocab_size)


def test_logits_have_the_dtype_of_the_model(make: Make) -> None:
    hidden = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
    assert loaded(make(dtype=torch.bfloat16), 9).logits(hidden).dtype == torch.bfloat16


def test_a_table_of_another_size_is_refused(make: Make) -> None:
    embedding = VocabEmbedding(make(1, 2), 10, HIDDEN)
    with pytest.raises(CheckpointError, match=r"gives \[9, 6\] where the model needs \[10, 6\]"):
        embedding.load_piece((0, 0, "weight"), SourceView(MemorySource({"t": torch.zeros(9, HIDDEN)}), "t"))


def test_positions_start_at_their_offset(make: Make) -> None:
    positions = PositionEmbedding(make(), 5, HIDDEN, offset=2)
    positions.weight.copy_(torch.arange(7.0).unsqueeze(1).expand(7, HIDDEN))
    assert positions(torch.tensor([0, 4, 1]))[:, 0].tolist() == [2, 6, 3]
