"""What a step sends arrives as it was, and blocks lie where the device and the CPU look for them."""

from __future__ import annotations

import numpy
import pytest
import torch

from plexor.extension.catalog import Catalog
from plexor.runtime.loading import Placement, make_build
from plexor.runtime.packer import NewBlocks
from plexor.runtime.state import ALIGNMENT, SlotState, send

CPU = torch.device("cpu")


@pytest.fixture
def state() -> SlotState:
    catalog = Catalog.load(allow=frozenset())
    build = make_build(catalog, catalog.kernel_table(), Placement(CPU, torch.float32))
    return SlotState(build, num_slots=3, max_blocks=5, block_size=4)


def give(state: SlotState, *blocks: NewBlocks) -> None:
    _, sent = send(state.new_blocks(blocks), CPU)
    state.write_blocks(*sent)


def test_arrays_of_any_type_and_length_arrive_in_one_run_of_bytes() -> None:
    arrays = [
        numpy.array([-1, 2**40, 7], dtype=numpy.int64),
        numpy.array([], dtype=numpy.int32),
        numpy.array([3], dtype=numpy.int32),
        numpy.array([0.25, -1.5, 1e30, 4.0, 5.0], dtype=numpy.float32),
    ]
    sent, views = send(arrays, CPU)
    assert [view.dtype for view in views] == [torch.int64, torch.int32, torch.int32, torch.float32]
    assert [view.tolist() for view in views] == [array.tolist() for array in arrays]
    assert sent.shape == (32 + 0 + 16 + 32,)
    assert all(view.storage_offset() * view.element_size() % ALIGNMENT == 0 for view in views)


def test_new_blocks_are_added_to_those_of_their_slot(state: SlotState) -> None:
    give(state, NewBlocks(1, 0, [9, 8]), NewBlocks(0, 0, [7]))
    give(state, NewBlocks(1, 2, [6]))
    assert state.block_table[:3].tolist() == [[7, 0, 0, 0, 0], [9, 8, 6, 0, 0], [0, 0, 0, 0, 0]]
    positions = numpy.array([0, 3, 4, 7, 8, 11])
    assert state.cache_slots(1, positions).tolist() == [36, 39, 32, 35, 24, 27]


def test_a_slot_taken_again_forgets_the_blocks_that_it_is_given_anew(state: SlotState) -> None:
    give(state, NewBlocks(2, 0, [4, 5, 6]))
    give(state, NewBlocks(2, 0, [1, 2]))
    assert state.cache_slots(2, numpy.array([0, 5])).tolist() == [4, 9]


def test_a_sequence_goes_on_from_what_was_kept(state: SlotState) -> None:
    give(state, NewBlocks(2, 0, [3, 1]))
    slots = torch.tensor([2])
    state.tokens[slots] = 77
    state.begin(slots, torch.tensor([4], dtype=torch.int32), torch.tensor([1]))
    rows = torch.tensor([2, -1])
    first = [part.tolist() for part in state.advance(rows)]
    assert first == [[77, 0], [4, 0], [4, -1], [5, 0], [1, 0]]
    state.tokens[slots] = 78
    second = [part.tolist() for part in state.advance(rows)]
    assert second == [[78, 0], [5, 0], [5, -1], [6, 0], [2, 0]]
    assert state.row_table[0, :2].tolist() == [3, 1]


def test_tables_stand_in_the_order_of_the_sequences(state: SlotState) -> None:
    give(state, NewBlocks(0, 0, [2]), NewBlocks(1, 0, [4, 3]))
    state.fill_rows(torch.tensor([1, 0]))
    assert state.row_table.tolist() == [[4, 3, 0, 0, 0], [2, 0, 0, 0, 0], [0] * 5]


def test_nothing_is_kept_of_padding(state: SlotState) -> None:
    slots, lengths = torch.tensor([-1, 1, -1]), torch.tensor([7, 5, 9], dtype=torch.int32)
    state.begin(slots, lengths, torch.tensor([3, 2, 4]))
    assert state.lengths[:3].tolist() == [0, 5, 0]
    assert state.steps[:3].tolist() == [0, 2, 0]


def test_room_for_entries_follows_the_blocks(state: SlotState) -> None:
    give(state, NewBlocks(1, 0, [4, 3]), NewBlocks(0, 0, [2]))
    give(state, NewBlocks(1, 2, [1]))
    assert [state.num_entries(slot) for slot in range(3)] == [4, 12, 0]
    give(state, NewBlocks(1, 0, [2]))
    assert state.num_entries(1) == 4


@pytest.mark.parametrize("lengths", [[], [4, 9]])
def test_sequences_of_one_row_are_the_first_of_the_row_table(state: SlotState, lengths: list[int]) -> None:
    state.row_table.copy_(torch.arange(15).view(3, 5))
    pages = state.one_row_pages(torch.tensor(lengths, dtype=torch.int32))
    assert pages.query_start.tolist() == list(range(len(lengths) + 1))
    assert pages.kv_length.tolist() == lengths
    assert pages.block_table.tolist() == [list(range(5)), list(range(5, 10))][: len(lengths)]
    assert (pages.max_query, pages.num_decodes, pages.prefills) == (1, len(lengths), ())
