"""The data that flows through a step: types only, each of which a test can make by hand.

T tokens in the batch, S sequences, R rows that need logits, H hidden size, V vocabulary, B blocks of a sequence,
N media embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

LayerCache = Mapping[str, Tensor]
"""One layer's part of the paged cache by the names its KV format gives, such as "keys", "values"."""


@dataclass(frozen=True, slots=True)
class MediaRows:
    """Embeddings that replace those of placeholder tokens: row rows[i] of the batch gets embeddings[i]."""

    rows: Tensor  # [N] int64
    embeddings: Tensor  # [N, H]


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step, prefill pieces and decodes side by side."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    media: tuple[MediaRows, ...] = ()


@dataclass(frozen=True, slots=True)
class Prefill:
    """What the host knows of a sequence's piece: num_rows rows from first_row, kv_length entries once they are written.

    sequence: its place in the step, the row of the block table.
    """

    sequence: int
    first_row: int
    num_rows: int
    kv_length: int


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Where the sequences of one step lie in the paged cache: what attention needs besides queries and the cache.

    num_decodes: the first so many sequences have one row each. prefills: the sequences after those, for providers that
    launch something for each. A maker that leaves both out promises nothing about any sequence.
    The tensors are complete before the kernels of the first layer start: a kernel may read them before it waits for the
    one that runs before it, as plexor.kernels.triton.pdl says.
    memo: what a provider derives from the rest once, for all layers of the step; each uses keys of its own.
    """

    query_start: Tensor  # [S + 1] int32: sequence s owns rows query_start[s] to query_start[s + 1]
    kv_length: Tensor  # [S] int32: entries of sequence s after this step's have been written
    block_table: Tensor  # [S, B] int32: blocks of each sequence in order
    max_query: int  # longest piece in the batch
    num_decodes: int = 0
    prefills: tuple[Prefill, ...] = ()
    memo: dict[object, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class LogitRows:
    """The rows whose next token is wanted; the last layer attends these alone.

    pages: what each of them sees, as if it were the one row of a sequence, in the order of index.
    """

    index: Tensor  # [R] int64
    pages: Pages


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What a forward needs besides the tokens; passed explicitly to every layer."""

    pages: Pages
    slots: Tensor  # [T] int64: where each token's entry goes (block * block_size + offset), -1 for padding
    logit_rows: LogitRows | None  # None: the next token of every row is wanted
    kv: tuple[LayerCache, ...]  # one for each layer that attends
