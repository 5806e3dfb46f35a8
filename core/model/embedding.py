"""Token embedding and output head, with the vocabulary shared out between the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plexor.checkpoint.view import TensorView
from plexor.model.build import Build


class VocabEmbedding(nn.Module):
    """A table [V, H] of which each rank holds an equal run of rows, the last one padded.

    It looks tokens up, and, tied or on its own, serves as the output head.
    """

    def __init__(self, build: Build, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self._mesh = build.mesh
        self.vocab_size = vocab_size
        self._hidden_size = hidden_size
        per_rank = -(-vocab_size // build.mesh.size)
        start = min(build.mesh.rank * per_rank, vocab_size)
        self._rows = range(start, min(start + per_rank, vocab_size))
        self.register_buffer("weight", torch.empty(per_rank, hidden_size, dtype=build.dtype, device=build.device))
        self.weight: Tensor
        if len(self._rows) < per_rank:
            self.weight[len(self._rows) :].zero_()
        self._product = build.bind("linear", out_features=per_rank, in_features=hidden_size)

    def pieces(self) -> set[tuple[int, int, str]]:
        return {(0, 0, "weight")}

    def load_piece(self, piece: tuple[int, int, str], view: TensorView) -> None:
        view.expect((self.vocab_size, self._hidden_size))
        if self._rows:
            rows = slice(self._rows.start, self._rows.stop)
            self.weight[: len(self._rows)].copy_(view.read_as(self.weight.dtype, rows))

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H], by a kernel that starts when all before it are complete (plexor.kernels.triton.pdl)."""
        if self._mesh.size == 1:
            return nn.functional.embedding(token_ids, self.weight)
        local = token_ids - self._rows.start
        mine = (local >= 0) & (local < len(self._rows))
        rows = nn.functional.embedding(local.where(mine, 0), self.weight) * mine.unsqueeze(-1)
        return self._mesh.all_reduce(rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [R, H] times the table, [R, V] in the model's dtype, on every rank."""
        local: Tensor = self._product(hidden, self.weight)
        return self._mesh.all_gather(local)[:, : self.vocab_size]


class PositionEmbedding(nn.Module):
    """Learned positions, a table [P, H] looked up at position + offset."""

    def __init__(self, build: Build, num_positions: int, hidden_size: int, offset: int = 0) -> None:
        super().__init__()
        shape = (num_positions + offset, hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=build.dtype, device=build.device), requires_grad=False)
        self._offset = offset

    def forward(self, positions: Tensor) -> Tensor:
        """[T] int64 -> [T, H]"""
        return nn.functional.embedding(positions + self._offset, self.weight)
