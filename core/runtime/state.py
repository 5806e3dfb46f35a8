"""What a rank keeps of each running sequence between steps, by slot, and how a step's numbers reach the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

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

PADDING = -1
"""The slot of rows and sequences that are none."""


def send(arrays: Sequence[Array], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """One-dimensional arrays to the device in one copy that does not wait for it.

    Gives the bytes that hold them one after the other, each from a multiple of ALIGNMENT, and a view for each array.
    """
    starts = _starts(arrays)
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = host.numpy()
    for start, array in zip(starts[:-1], arrays, strict=True):
        target[start : start + array.nbytes] = array.view(numpy.uint8)
    sent = host.to(device, non_blocking=True)
    return sent, views(sent, arrays)


def views(sent: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """What lies in bytes that begin as `send` gave them for arrays of these sizes and types."""
    return [
        sent[start : start + array.nbytes].view(getattr(torch, array.dtype.name))
        for start, array in zip(_starts(arrays)[:-1], arrays, strict=True)
    ]


def _starts(arrays: Sequence[Array]) -> list[int]:
    """Where each of them begins, and the end of all."""
    return [0, *accumulate(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]


class SlotState:
    """By slot, on the device: the last drawn token, cache entries, tokens drawn, and the block table.

    tokens [N] int64, lengths [N + 1] int32, steps [N + 1] int64, block_table [N, W] int32; the last of lengths and
    steps takes what is stated of padding. row_table [N, W] int32: the block tables in the order of a step's sequences.
    A sequence's tokens, lengths and steps are valid once a step has drawn for it; its blocks from the first step on.
    """

    def __init__(self, build: Build, num_slots: int, max_blocks: int, block_size: int) -> None:
        device = build.device
        self.device = device
        self.num_slots = num_slots
        self.block_size = block_size
        self.tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.steps = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self.row_table = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self._starts = torch.arange(num_slots + 1, dtype=torch.int32, device=device)
        self._known = numpy.zeros((num_slots, max_blocks), dtype=numpy.int32)
        self._num_blocks = [0] * num_slots
        self._advance: Callable[..., Advanced] = build.bind("advance")

    def advance(self, slots: Tensor) -> Advanced:
        """token_ids, positions, cache_slots, kv_length and drawn of rows for these slots, as the op `advance` says."""
        return self._advance(
            slots, self.tokens, self.lengths, self.steps, self.block_table, self.row_table, self.block_size
        )

    def fill_rows(self, slots: Tensor) -> None:
        """Copy the block tables of these slots to the row table."""
        torch.index_select(self.block_table, 0, slots, out=self.row_table[: slots.shape[0]])

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
            self._num_blocks[part.slot] = part.first + len(part.blocks)
        index, values = numpy.array(places, dtype=numpy.int64), numpy.array(blocks, dtype=numpy.int32)
        self._known.reshape(-1)[index] = values
        return index, values

    def write_blocks(self, places: Tensor, blocks: Tensor) -> None:
        self.block_table.view(-1).scatter_(0, places, blocks)

    def num_entries(self, slot: int) -> int:
        """Room in the blocks of a slot's sequence, which has at most that many entries."""
        return self._num_blocks[slot] * self.block_size

    def cache_slots(self, slot: int, positions: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
        """Where the entries of these positions of a sequence go."""
        blocks: NDArray[numpy.int64] = self._known[slot, positions // self.block_size].astype(numpy.int64)
        return blocks * self.block_size + positions % self.block_size

    def begin(self, slots: Tensor, lengths: Tensor, steps: Tensor) -> None:
        """State the entries and drawn tokens of sequences that go on by `advance` from the next step on; of padding,
        nothing is kept.
        """
        self.lengths[slots] = lengths
        self.steps[slots] = steps
