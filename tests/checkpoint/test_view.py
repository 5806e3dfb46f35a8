"""Views against plain torch: whatever part is asked for, it is that part of the whole, and no more is read."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plexor.checkpoint.view import Grid, GroupView, Interleaved, Rows, SourceView, Step, TensorView, Transpose
from plexor.errors import CheckpointError
from plexor.model.dense import DenseFormat
from plexor.model.format import LinearFormat
from plexor.testing.source import FILE, MemorySource


def view_of(tensor: Tensor) -> TensorView:
    return SourceView(MemorySource({"weight": tensor}), "weight")


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@st.composite
def spans(draw: st.DrawFn, size: int, unit: int = 1) -> slice:
    """A slice of whole units."""
    start = draw(st.integers(0, size // unit))
    return slice(start * unit, draw(st.integers(start, size // unit)) * unit)


def test_a_view_knows_its_shape_and_where_it_comes_from() -> None:
    view = view_of(numbered(4, 3))
    assert view.shape == (4, 3)
    assert view.origin == f"tensor 'weight' of {FILE}"
    view.expect((4, 3))
    with pytest.raises(CheckpointError, match=re.escape("gives [4, 3] where the model needs [3, 4]")):
        view.expect((3, 4))


@given(st.data())
def test_transpose(data: st.DataObject) -> None:
    whole = numbered(5, 7)
    view = Transpose().apply(view_of(whole))
    rows, columns = data.draw(spans(7)), data.draw(spans(5))
    assert view.shape == (7, 5)
    assert torch.equal(view.read(rows, columns), whole.T[rows, columns])
    assert torch.equal(view.read(rows), whole.T[rows])


def test_transpose_leaves_a_bias() -> None:
    assert torch.equal(Transpose().apply(view_of(numbered(5))).read(slice(1, 3)), numbered(5)[1:3])


@given(st.data())
def test_rows_of_a_transposed_tensor(data: st.DataObject) -> None:
    whole = numbered(5, 12)
    view = Rows(4, 8, 12).apply(Transpose().apply(view_of(whole)))
    rows, columns = data.draw(spans(4)), data.draw(spans(5))
    assert view.shape == (4, 5)
    assert torch.equal(view.read(rows, columns), whole.T[4:8][rows, columns])


@given(st.data())
def test_interleaved(data: st.DataObject) -> None:
    units, of, unit = 3, 3, 4
    whole = numbered(units * of * unit, 5)
    index = data.draw(st.integers(0, of - 1))
    view = Interleaved(index, of, unit).apply(view_of(whole))
    part = whole.view(units, of, unit, 5)[:, index].reshape(units * unit, 5)
    rows, columns = data.draw(spans(units * unit, unit)), data.draw(spans(5))
    assert view.shape == (units * unit, 5)
    assert torch.equal(view.read(rows, columns), part[rows, columns])


def test_interleaved_bias_and_transposed_weight() -> None:
    step = Interleaved(1, 2, 3)
    assert step.apply(view_of(numbered(12))).read().tolist() == [3, 4, 5, 9, 10, 11]
    turned = step.apply(Transpose().apply(view_of(numbered(2, 12))))
    assert torch.equal(turned.read(), numbered(2, 12).T.view(2, 2, 3, 2)[:, 1].reshape(6, 2))


def test_a_group_of_a_stack() -> None:
    stack = numbered(3, 4, 5)
    view = GroupView(view_of(stack), 1)
    assert view.shape == (4, 5)
    assert torch.equal(view.read(slice(1, 3), slice(0, 2)), stack[1, 1:3, :2])
    assert torch.equal(Transpose().apply(view).read(slice(2, 5)), stack[1].T[2:5])


def test_only_the_asked_part_is_read() -> None:
    source = MemorySource({"weight": numbered(3, 8, 5)})
    Rows(4, 8, 8).apply(GroupView(SourceView(source, "weight"), 2)).read(slice(1, 2), slice(0, 3))
    assert source.reads == [("weight", (slice(2, 3), slice(5, 6), slice(0, 3)))]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Rows(0, 4, 12), "has 10 output features where the model needs 12"),
        (Interleaved(0, 3, 2), "which 3 interleaved"),
    ],
)
def test_a_fused_tensor_of_another_size_is_refused(step: Step, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        step.apply(view_of(numbered(10, 4)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_where_they_are_read(bad: float) -> None:
    whole = numbered(4, 3)
    whole[2, 1] = bad
    assert view_of(whole).read(slice(0, 2)).shape == (2, 3)
    with pytest.raises(CheckpointError, match=r"weight.* in 1 of 3 values"):
        view_of(whole).read(slice(2, 3))


class GridOfNumbers(MemorySource):
    """Tells a grid whose scales are the numbers of the rows that are asked for, in formats named by the cut."""

    def grid(self, name: str, index: tuple[slice, ...] = ()) -> Grid | None:
        rows = torch.arange(self.info(name).shape[0])[index[0]]
        numbers = self.read(name, index).to(torch.int8)
        return Grid(numbers, rows.float().unsqueeze(1), None, self.info(name).shape[1], torch.int8, 8)

    def formats(self, name: str, index: tuple[slice, ...] = ()) -> tuple[LinearFormat, ...]:
        return (DenseFormat(),) if index[1] == slice(0, 2) else ()


def test_a_grid_follows_rows_and_no_step_that_turns_them() -> None:
    base = SourceView(GridOfNumbers({"weight": numbered(12, 4)}), "weight")
    part = Rows(4, 9, 12).apply(base).grid(slice(1, 3), slice(0, 4))
    assert part is not None
    assert part.scale.tolist() == [[5.0], [6.0]]
    assert part.numbers[:, 0].tolist() == [20, 24]
    assert Transpose().apply(base).grid(slice(0, 2), slice(0, 2)) is None
    assert view_of(numbered(3, 4)).grid(slice(0, 2)) is None


@pytest.mark.parametrize("rows", [slice(0, 4), slice(1, 2), slice(1, 4), slice(2, 3)])
def test_interleaved_rows_and_their_grid_are_cut_anywhere(rows: slice) -> None:
    """Parts of three rows each alternate in units of two: 0 1 | 2 3 | 4 5 and again."""
    base = SourceView(GridOfNumbers({"weight": numbered(12, 4)}), "weight")
    part = Interleaved(1, 3, 2).apply(base)
    own = [2, 3, 8, 9][rows]
    assert part.read(rows)[:, 0].tolist() == [4.0 * row for row in own]
    grid = part.grid(rows, slice(0, 4))
    assert grid is not None
    assert grid.scale[:, 0].tolist() == own
    assert grid.numbers[:, 0].tolist() == [4 * row for row in own]


def test_formats_follow_the_columns_that_are_cut() -> None:
    base = SourceView(GridOfNumbers({"weight": numbered(12, 4)}), "weight")
    for view in (base, Rows(4, 9, 12).apply(base), Interleaved(0, 2, 2).apply(base)):
        assert len(view.formats(slice(0, 2), slice(0, 2))) == 1
        assert view.formats(slice(0, 2), slice(0, 4)) == ()
    assert Transpose().apply(base).formats(slice(0, 2), slice(0, 2)) == ()
    assert view_of(numbered(3, 4)).formats(slice(0, 2)) == ()
