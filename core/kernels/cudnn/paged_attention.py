"""Paged attention whose long prefill pieces go to cuDNN, through torch, and everything else to Triton.

cuDNN makes a plan for each shape that it meets, which takes as long as many calls. So it is only given rows by
thousands, from the front of a piece that begins after thousands of positions; what is left over costs little:

    positions   |cached  |own                 |
    rows                 |thousands       |few|
                 not masked, causal        Triton
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plexor.batch import LayerCache, Pages, Prefill
from plexor.extension.specs import Facts
from plexor.kernels.cuda.attention_choice import decodes_here
from plexor.kernels.triton.join_attention import join_attention
from plexor.kernels.triton.paged_attention import PagedAttention as TritonAttention
from plexor.kernels.triton.prefill_attention import Pieces, prefill_attention

STEP = 1024
"""Rows are given to the library, and positions lie before them, in multiples of this."""

GATHERED = 32 * STEP
"""Positions whose keys and values are gathered for one call at most."""

Library = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""(q [S, N, n, D], keys, values [S, K, L, D], causal, scale) -> output [S, N, n, D], log of the sums [S, N, n]."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Pieces alike, one after the other in the batch: S of them with num_rows each, of which the first are attended.

    num_cached: positions before each one's rows. blocks [S * B]: those of the cached and the attended positions.
    """

    first_row: int
    num_pieces: int
    num_rows: int
    num_attended: int
    num_cached: int
    blocks: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A step's attention: what the library is given, the rows left over, and where padding begins."""

    runs: tuple[Run, ...]
    rest: Pieces | None
    end: int

    def is_one_call(self, num_rows: int) -> bool:
        """Whether one call attends every row of the batch to all that it sees, so that its result needs no copying."""
        run = self.runs[0]
        return run.num_cached == 0 and run.num_pieces * run.num_attended == num_rows


class PagedAttention:
    """The attention of one layer."""

    def __init__(self, library: Library | None = None, step: int = STEP) -> None:
        self._library = cudnn_attention if library is None else library
        self._step = step
        self._triton = TritonAttention(decodes_here())

    def __call__(self, q: Tensor, cache: LayerCache, pages: Pages, scale: float, window: int | None) -> Tensor:
        """As plexor.kernels.reference.paged_attention; scale > 0, the cache's entries [K, D] are contiguous."""
        plan = self._plan(pages, window, cache["keys"].shape[1])
        if plan is None:
            return self._triton(q, cache, pages, scale, window)
        if plan.is_one_call(q.shape[0]):
            run = plan.runs[0]
            attended, _ = attend_own(self._library, rows_of(run, q), *gathered(cache, run), run, scale)
            return attended.transpose(1, 2).reshape(q.shape)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if pages.num_decodes:
            self._triton.attend_decodes(q, cache, pages, scale, window, out)
        if plan.rest is not None:
            prefill_attention(q, cache, plan.rest, scale, window, out)
        for run in plan.runs:
            attend_run(self._library, rows_of(run, q), cache, run, scale, rows_of(run, out))
        out[plan.end :].zero_()
        return out

    def _plan(self, pages: Pages, window: int | None, block_size: int) -> Plan | None:
        key = (__name__, window, block_size)
        if key not in pages.memo:
            pages.memo[key] = make_plan(pages, window, block_size, self._step)
        plan: Plan | None = pages.memo[key]
        return plan


def refuses(facts: Facts) -> str | None:
    """Why the library cannot attend a model's long pieces."""
    if facts.kv_dtype != facts.dtype:
        return f"reads a cache of the model's own dtype, not {facts.kv_dtype} beside {facts.dtype}"
    head_size = facts.shape.get("head_size", 0)
    if head_size > 128 or head_size % 8:
        return f"takes heads of at most 128 features, a multiple of 8, not {head_size}"
    if not torch.backends.cudnn.is_available():
        return "needs a torch that comes with cuDNN"
    return None


def cudnn_attention(q: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """A Library: row i sees the first i + 1 positions if causal."""
    attended: Tensor
    log_sums: Tensor
    attended, log_sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, keys, values, None, True, 0.0, causal, False, scale=scale
    )
    return attended, log_sums.view(q.shape[:3])


def make_plan(pages: Pages, window: int | None, block_size: int, step: int) -> Plan | None:
    """What the library is given of a step; None if nothing, or if the host does not know the pieces."""
    prefills = pages.prefills
    if pages.num_decodes + len(prefills) != pages.kv_length.shape[0]:
        return None
    taken = [num_taken(piece, window, step) for piece in prefills]
    if not any(taken):
        return None
    runs = tuple(
        make_run(pages, prefills[first], taken[first], count, block_size) for first, count in alike(prefills, taken)
    )
    last = prefills[-1]
    return Plan(runs, leftover(pages, taken), last.first_row + last.num_rows)


def num_taken(piece: Prefill, window: int | None, step: int) -> int:
    """How many of a piece's rows the library is given."""
    num_cached = piece.kv_length - piece.num_rows
    num_rows = piece.num_rows - piece.num_rows % step
    masked = window is not None and window < piece.kv_length
    if masked or num_cached % step or num_cached + num_rows > GATHERED:
        return 0
    return num_rows


def alike(prefills: tuple[Prefill, ...], taken: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of pieces that one call can attend: equal neighbours, as many as a power of two."""
    first = 0
    while first < len(prefills):
        shape = (prefills[first].num_rows, prefills[first].kv_length)
        most = max(1, GATHERED // max(1, prefills[first].kv_length)) if taken[first] else 1
        count = 1
        while first + count < len(prefills) and count < most and shape == _shape(prefills[first + count]):
            count += 1
        count = 1 << (count.bit_length() - 1)
        if taken[first]:
            yield first, count
        first += count


def _shape(piece: Prefill) -> tuple[int, int]:
    return piece.num_rows, piece.kv_length


def make_run(pages: Pages, piece: Prefill, num_attended: int, count: int, block_size: int) -> Run:
    """count: pieces like this one, which is the first of them."""
    num_cached = piece.kv_length - piece.num_rows
    num_blocks = -(-(num_cached + num_attended) // block_size)
    blocks = pages.block_table[piece.sequence : piece.sequence + count, :num_blocks].flatten()
    return Run(piece.first_row, count, piece.num_rows, num_attended, num_cached, blocks)


def leftover(pages: Pages, taken: list[int]) -> Pieces | None:
    """The rows of each piece after those that were taken."""
    pieces = [
        Prefill(piece.sequence, piece.first_row + rows, piece.num_rows - rows, piece.kv_length)
        for piece, rows in zip(pages.prefills, taken, strict=True)
        if piece.num_rows > rows
    ]
    if not pieces:
        return None
    ends, shifts, end = [], [], 0
    for piece in pieces:
        shifts.append(piece.first_row - end)
        end += piece.num_rows
        ends.append(end)
    device = pages.kv_length.device
    facts = torch.tensor(
        [ends, shifts, [piece.kv_length for piece in pieces], [piece.sequence for piece in pieces]],
        dtype=torch.int32,
        pin_memory=device.type == "cuda",
    )
    row_end, row_shift, kv_length, sequence = facts.to(device, non_blocking=True).unbind()
    block_table = pages.block_table.index_select(0, sequence)
    return Pieces(end, max(piece.num_rows for piece in pieces), row_end, row_shift, kv_length, block_table)


def rows_of(run: Run, batch: Tensor) -> Tensor:
    """The attended rows [S, n, N, D] of a run in a batch [T, N, D], as a view."""
    rows = batch[run.first_row : run.first_row + run.num_pieces * run.num_rows]
    return rows.view(run.num_pieces, run.num_rows, *batch.shape[1:])[:, : run.num_attended]


def attend_run(library: Library, q: Tensor, cache: LayerCache, run: Run, scale: float, out: Tensor) -> None:
    """Attend q into out, both [S, n, N, D].

    The library's causal mask begins at the first position, so the positions before the rows are attended by themselves
    and joined to the rest.
    """
    keys, values = gathered(cache, run)
    own, own_sums = attend_own(library, q, keys, values, run, scale)
    if run.num_cached == 0:
        out.copy_(own.transpose(1, 2))
        return
    cached = slice(run.num_cached)
    before, before_sums = library(q.transpose(1, 2), keys[:, :, cached], values[:, :, cached], False, scale)
    join_attention(own, own_sums, before, before_sums, out)


def attend_own(
    library: Library, q: Tensor, keys: Tensor, values: Tensor, run: Run, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend q [S, n, N, D] to the rows' own positions among those gathered -> [S, N, n, D], logs of the sums."""
    own = slice(run.num_cached, run.num_cached + run.num_attended)
    return library(q.transpose(1, 2), keys[:, :, own], values[:, :, own], True, scale)


def gathered(cache: LayerCache, run: Run) -> tuple[Tensor, Tensor]:
    """Keys and values [S, K, L, D] of a run's pieces, in order of their positions."""
    keys, values = (cache[name].index_select(0, run.blocks) for name in ("keys", "values"))
    shape = (run.num_pieces, -1, *keys.shape[2:])
    return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)
