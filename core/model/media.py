"""What a model that sees implements besides Model, and what its input processor hands over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class MediaModel(Protocol):
    """A model whose placeholder tokens are replaced by embeddings of media."""

    def encode(self, kind: str, items: Sequence[Tensor]) -> list[Tensor]:
        """Each processed item (an image [3, h, w]) to its embeddings [n, H], n the number of its placeholder tokens."""
        ...
