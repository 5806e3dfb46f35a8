"""What a model must read and compute, counted from the modules it is built of and from nothing else.

All counts are those of one rank. Norms, position tables and activations are left out: they are less than a hundredth,
and what is left out only lowers the bound that is made of the counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from plexor.model.attention import Attention
from plexor.model.build import Build
from plexor.model.decoder import Decoder, DecoderLayer
from plexor.model.embedding import VocabEmbedding
from plexor.model.linear import GroupedLinear, LinearWeight
from plexor.runtime.loading import BuiltModel


@dataclass(frozen=True, slots=True)
class WeightCost:
    """One weight, or a stack of as many as `groups` of which each token uses `rows_per_token`.

    dtype: of its numbers, as they are stored. num_bytes: scales and bias included. operations: for one token, a
    multiplication and an addition for each weight. drawn_only: used for the rows that draw a token and no others.
    """

    dtype: torch.dtype
    num_bytes: int
    operations: int
    groups: int = 1
    rows_per_token: int = 1
    drawn_only: bool = False

    def read_bytes(self, num_rows: int) -> float:
        """What a step of so many rows reads of it; of a stack, on average where each choice is as likely."""
        idle = (1 - self.rows_per_token / self.groups) ** num_rows if self.groups > 1 else 0.0
        return self.num_bytes * (1 - idle)


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """One layer. num_bytes: of one cached position. window: positions that a token sees, None for all."""

    num_bytes: int
    num_heads: int
    head_size: int
    window: int | None

    @property
    def operations(self) -> int:
        """What one query takes for one position: a product with its key, another with its value."""
        return 4 * self.num_heads * self.head_size

    def seen(self, first: int, last: int) -> int:
        """Positions that the queries at positions first to last - 1 see, their own included, added up."""
        if self.window is None:
            return (last * (last + 1) - first * (first + 1)) // 2
        return sum(min(position + 1, self.window) for position in range(first, last))


@dataclass(frozen=True, slots=True)
class ModelCost:
    """All weights that a token meets, the output head among them, and all layers that attend."""

    weights: tuple[WeightCost, ...]
    attention: tuple[AttentionCost, ...]

    def weight_bytes(self, num_tokens: int, num_drawn: int) -> float:
        """What one step reads of the weights."""
        return sum(weight.read_bytes(num_drawn if weight.drawn_only else num_tokens) for weight in self.weights)

    def operations(self, num_tokens: int, num_drawn: int) -> dict[torch.dtype, int]:
        """What the products of so many tokens take, by the dtype of the weights."""
        counts: dict[torch.dtype, int] = {}
        for weight in self.weights:
            rows = num_drawn if weight.drawn_only else num_tokens
            counts[weight.dtype] = counts.get(weight.dtype, 0) + rows * weight.operations
        return counts

    def cache_bytes(self, first: int, last: int) -> int:
        """What the decodes at positions first to last - 1 of one sequence read of keys and values."""
        return sum(layer.num_bytes * layer.seen(first, last) for layer in self.attention)

    def attention_operations(self, num_tokens: int) -> int:
        """What attention within one prompt takes."""
        return sum(layer.operations * layer.seen(0, num_tokens) for layer in self.attention)


def count_model(built: BuiltModel) -> ModelCost:
    """The counts of a built model, whether or not its tensors have memory.

    Of a model that sees only the decoder is counted: what runs for a text.
    """
    text = next((module for module in built.module.modules() if isinstance(module, Decoder)), built.module)
    late = set(_after_attention(text))
    weights = [_weight(module, module in late) for module in text.modules() if isinstance(module, LinearWeight)]
    attention = [_attention(module, built.build) for module in text.modules() if isinstance(module, Attention)]
    return ModelCost((*weights, *_head(text)), tuple(attention))


def _attention(layer: Attention, build: Build) -> AttentionCost:
    position = layer.kv_shape(1, 1)
    kept = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in build.kv_storage(position))
    return AttentionCost(kept, layer.num_heads, position.head_size, layer.window)


def _weight(module: LinearWeight, drawn_only: bool) -> WeightCost:
    tensors = [*module.stored.values(), *([] if module.bias is None else [module.bias])]
    largest = max(module.stored.values(), key=lambda tensor: tensor.nbytes)
    rows = module.rows_per_token if isinstance(module, GroupedLinear) else 1
    operations = 2 * module.shape.out_features * module.shape.in_features * rows
    total = sum(tensor.nbytes for tensor in tensors)
    return WeightCost(largest.dtype, total, operations, module.groups, rows, drawn_only)


def _after_attention(text: nn.Module) -> Iterator[nn.Module]:
    """What follows attention in the last layer, and leads to the head: other rows end before it."""
    if isinstance(text, Decoder):
        last = text.layers[-1]
        assert isinstance(last, DecoderLayer)
        for part in (last.attention.out, last.feed_forward, text.project_out):
            yield from () if part is None else part.modules()


def _head(text: nn.Module) -> Iterator[WeightCost]:
    """The table that makes logits: the last one, which is the only one where it is tied."""
    tables = [module for module in text.modules() if isinstance(module, VocabEmbedding)]
    for table in tables[-1:]:
        yield WeightCost(table.weight.dtype, table.weight.nbytes, 2 * table.weight.numel(), drawn_only=True)
