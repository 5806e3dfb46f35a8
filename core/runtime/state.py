"""What a rank keeps of each running sequence between steps, by slot, and how a step's numbers reach the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from plexor.batch import Pages
from plexor.model.build import Build
from plexor.runtime.packer import NewBlocks

Advanced = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Array = NDArray[numpy.int64] | NDArray[numpy.int32] | NDArray[numpy.float32]
"""The numbers that a step sends."""

ALIGNMENT = 16
"""Bytes: kernels are compiled anew for pointers that are aligned differently."""


def send(arrays: Sequence[Array], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """One-dimensional arrays to the device in one copy that does not wait for it.

    Gives the bytes that hold them one after the other, each from a multiple of ALIGNMENT, and a view for each array.
    """
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = host.numpy()
    for start, array in zip(starts, arrays, strict=True):
        target[start : start + array.nbytes] = array.view(numpy.uint8)
    sent = host.to(device, non_blocking=True)
    dtypes = (getattr(torch, array.dtype.name) for array in arrays)
    views = [
        sent[start : start + array.nbytes].view(dtype)
        for start, array, dtype in zip(starts, arrays, dtypes, strict=True)
    ]
    return sent, views


class SlotState:
    """By slot, on the device: the last drawn token, cache entries, tokens drawn, and the block table.

    tokens [N] int64, lengths [N] int32, steps [N] int64, block_table [N, W] int32. row_table [N, W] int32: the block
    tables in the order of a step's sequences.
    A sequence's tokens, lengths and steps are valid once a step has drawn for it; its blocks from the first step on.
    """

    def __init__(self, build: Build, num_slots: int, max_blocks: int, block_size: int) -> None:
        device = build.device
        self.device = device
        self.num_slots = num_slots
        self.block_size = block_size
        self.tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.steps = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self.row_table = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self._starts = torch.arange(num_slots + 1, dtype=torch.int32, device=device)
        self._known = numpy.zeros((num_slots, max_blocks), dtype=numpy.int32)
        self._advance: Callable[..., Advanced] = build.bind("advance")

    def advance(self, slots: Tensor) -> Advanced:
        """token_ids, positions, cache_slots, kv_length and drawn of rows for these slots, as the op `advance` says."""
        return self._advance(
            slots, self.tokens, self.lengths, self.steps, self.block_table, self.row_table, self.block_size
        )

    def fill_rows(self, slots: Tensor, first_row: int) -> None:
        """Copy the block tables of these slots to the row table, from first_row on."""
        rows = self.row_table[first_row : first_row + slots.shape[0]]
        torch.index_select(self.block_table, 0, slots, out=rows)

    def one_row_pages(self, kv_length: Tensor) -> Pages:
        """Pages of the step's first sequences with one row each; kv_length [S] int32: their entries."""
        count = kv_length.shape[0]
        return Pages(self._starts[: count + 1], kv_length, self.row_table[:count], max_query=1, num_decodes=count)

    def new_blocks(self, new: Sequence[NewBlocks]) -> tuple[Array, Array]:
        """Places in the flat block table and what to write there, to be sent and given to `write_blocks`."""
        width = self._known.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for part in new:
            start = part.slot * width + part.first
            places.extend(range(start, start + len(part.blocks)))
            blocks.extend(part.blocks)
        index, values = numpy.array(places, dtype=numpy.int64), numpy.array(blocks, dtype=numpy.int32)
        self._known.reshape(-1)[index] = values
        return index, values

    def write_blocks(self, places: Tensor, blocks: Tensor) -> None:
        self.block_table.view(-1).scatter_(0, places, blocks)

    def cache_slots(self, slot: int, positions: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
        """Where the entries of these positions of a sequence go."""
        blocks: NDArray[numpy.int64] = self._known[slot, positions // self.block_size].astype(numpy.int64)
        return blocks * self.block_size + positions % self.block_size

    def begin(self, slots: Tensor, lengths: Tensor, steps: Tensor) -> None:
        """State the entries and drawn tokens of sequences that go on by `advance` from the next step on."""
        self.lengths[slots] = lengths
        self.steps[slots] = steps
