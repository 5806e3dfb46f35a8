"""What a step takes of a device's memory beside weights and cache, counted from the model's shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from torch import nn

from plexor.errors import CapacityError
from plexor.model.linear import GroupedLinear, LinearWeight
from plexor.runtime.loading import BuiltModel

WORKSPACE = 48 << 20
"""Bytes on each stream of a GPU: what torch gives cuBLAS there, and what kernels hand from one program to another."""

LOGPROB_BYTES = 12
"""For each logit of a row that wants log probabilities: the row widened, its log softmax, a comparison."""


def activation_bytes(built: BuiltModel, num_tokens: int, num_rows: int) -> int:
    """The peak of a step of num_tokens that draws num_rows tokens, and what is kept between steps for num_rows slots.

    The layers and the logits have their peaks one after the other, so the larger one counts:

        layers   for each token the numbers at the widest place of a layer, see `widest`
        logits   each row in the model's dtype, and widened where all of them want log probabilities
    """
    itemsize = built.build.dtype.itemsize
    layers = num_tokens * widest(built.module) * itemsize
    logits = num_rows * built.config.vocab_size * (itemsize + LOGPROB_BYTES)
    return max(layers, logits) + (WORKSPACE if built.build.device.type == "cuda" else 0)


def graph_bytes(built: BuiltModel, num_rows: int, num_drawn: int) -> int:
    """The memory that all captured steps share: what the largest take, of num_rows rows or of num_drawn logits."""
    itemsize = built.build.dtype.itemsize
    return (num_rows * widest(built.module) + num_drawn * built.config.vocab_size) * itemsize + WORKSPACE


def table_bytes(num_slots: int, max_blocks: int) -> int:
    """Two block tables of int32, by slot and by row; what else is kept for a slot is small."""
    return 2 * 4 * num_slots * max_blocks


def check_tables(num_slots: int, max_blocks: int, unused: int) -> None:
    """CapacityError if the tables of as many sequences as may run cannot fit."""
    size = table_bytes(num_slots, max_blocks)
    if size > unused:
        raise CapacityError(
            f"the block tables of {num_slots:,} sequences of {max_blocks:,} blocks take {size:,} bytes, but {unused:,} "
            "are there: lower --max-sequences or --max-length"
        )


def widest(module: nn.Module) -> int:
    """Numbers for each token at the widest place of any layer.

    A layer is two linear layers in a row, such as gate_up and down: beside the residual stream and its normed copy, the
    first one's output and the second one's input are there at once. In a stack of experts both, and the rows that were
    gathered for it, are there for each expert that a token visits.
    """
    return max((_width(linears) for linears in _layers(module)), default=0)


def _layers(module: nn.Module) -> Iterator[Sequence[LinearWeight]]:
    for parent in module.modules():
        linears = [child for child in parent.children() if isinstance(child, LinearWeight)]
        if linears:
            yield linears


def _width(linears: Sequence[LinearWeight]) -> int:
    first, last = linears[0], linears[-1]
    inner = max(_inner_widths(linears), default=last.shape.in_features + last.shape.out_features)
    if isinstance(first, GroupedLinear):
        inner = first.rows_per_token * (first.shape.in_features + inner)
    return 2 * last.shape.out_features + inner


def _inner_widths(linears: Sequence[LinearWeight]) -> Iterable[int]:
    return (left.shape.out_features + right.shape.in_features for left, right in pairwise(linears))
