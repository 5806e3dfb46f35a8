"""Lazy views of a checkpoint's tensors: transposed, cut or de-interleaved, and read only where they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from plexor.checkpoint.source import TensorSource, check_finite
from plexor.errors import CheckpointError

if TYPE_CHECKING:
    from plexor.model.format import LinearFormat

WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class Grid:
    """A stored weight [rows, columns] as it was rounded: (number - zero_point) x scale.

    numbers: [rows, columns] in the dtype `codes`, of which they take `bits` bits: int8 with 4 is -8 to 7.
    scale: float32 [rows, groups]; each serves group_size consecutive columns, the last group perhaps fewer.
    zero_point: int32 [rows, groups], None where it is zero everywhere.
    order: int64 [columns], every column once; the groups are then of consecutive columns of numbers[:, order].
    factor: float32 [columns], by which the whole is multiplied, or the inputs of the layer instead.
    """

    numbers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int
    codes: torch.dtype
    bits: int
    order: Tensor | None = None
    factor: Tensor | None = None

    def rows(self, rows: slice) -> Grid:
        """The same of some rows."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return replace(self, numbers=self.numbers[rows], scale=self.scale[rows], zero_point=zero_point)


@runtime_checkable
class GridSource(Protocol):
    """A TensorSource that knows which grid some of its tensors were rounded to."""

    def grid(self, name: str, index: tuple[slice, ...] = ()) -> Grid | None:
        """What `read` gives for the same arguments, as stored; None where it is not rounded, or a cut parts a group."""
        ...


@runtime_checkable
class FormatSource(Protocol):
    """A GridSource that also knows which number formats keep a weight as it is stored, before any of it is read."""

    def formats(self, name: str, index: tuple[slice, ...] = ()) -> tuple[LinearFormat, ...]:
        """Those that take the grid of this cut, the nearest to the checkpoint first; none where it is to be dense."""
        ...


class TensorView(ABC):
    """A tensor that has not been read yet. `origin` names file and tensor for messages."""

    origin: str
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, *index: slice) -> Tensor:
        """The part of the tensor at these slices (stop and start set, step 1), on whichever device the view has it."""

    def grid(self, *index: slice) -> Grid | None:
        """That part as it is stored; None where it is not rounded, or its rows and columns are no longer as stored."""
        return None

    def formats(self, *index: slice) -> tuple[LinearFormat, ...]:
        """The number formats that keep that part as it is stored, the nearest first; none where it is to be dense."""
        return ()

    def read_as(self, dtype: torch.dtype, *index: slice) -> Tensor:
        """As `read`, in another floating dtype; CheckpointError if a value is beyond its range."""
        tensor = self.read(*index)
        kept = tensor.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not bool(kept.isfinite().all()):
            name = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.origin} holds {float(tensor.abs().max()):.3g}, which is beyond the range of {name}: "
                "choose a wider --dtype"
            )
        return kept

    def expect(self, shape: tuple[int, ...]) -> None:
        """CheckpointError unless the view has this shape."""
        if self.shape != shape:
            raise CheckpointError(
                f"{self.origin} gives {list(self.shape)} where the model needs {list(shape)}: "
                "config.json and the weights do not belong together"
            )


class SourceView(TensorView):
    """A tensor as it lies in the source; values that are not finite are refused when read."""

    def __init__(self, source: TensorSource, name: str) -> None:
        self._source = source
        self._info = source.info(name)
        self.origin = f"tensor {name!r} of {self._info.file}"
        self.shape = self._info.shape

    def read(self, *index: slice) -> Tensor:
        tensor = self._source.read(self._info.name, index)
        check_finite(tensor, self._info)
        return tensor

    def grid(self, *index: slice) -> Grid | None:
        grid = self._source.grid(self._info.name, index) if isinstance(self._source, GridSource) else None
        if grid is not None:
            check_finite(grid.numbers, self._info)
        return grid

    def formats(self, *index: slice) -> tuple[LinearFormat, ...]:
        return self._source.formats(self._info.name, index) if isinstance(self._source, FormatSource) else ()


class _Transposed(TensorView):
    def __init__(self, base: TensorView) -> None:
        self._base = base
        self.origin = base.origin
        self.shape = base.shape[::-1]

    def read(self, *index: slice) -> Tensor:
        tensor = self._base.read(*_full(index, len(self.shape))[::-1])
        return tensor.permute(*range(tensor.dim() - 1, -1, -1))


class _Rows(TensorView):
    def __init__(self, base: TensorView, start: int, stop: int, of: int) -> None:
        if base.shape[0] != of:
            raise CheckpointError(
                f"{base.origin} has {base.shape[0]} output features where the model needs {of}: "
                "config.json and the weights do not belong together"
            )
        self._base = base
        self._start = start
        self.origin = base.origin
        self.shape = (stop - start, *base.shape[1:])

    def read(self, *index: slice) -> Tensor:
        rows, *rest = _full(index, len(self.shape))
        return self._base.read(self._moved(rows), *rest)

    def grid(self, *index: slice) -> Grid | None:
        rows, *rest = _full(index, len(self.shape))
        return self._base.grid(self._moved(rows), *rest)

    def formats(self, *index: slice) -> tuple[LinearFormat, ...]:
        rows, *rest = _full(index, len(self.shape))
        return self._base.formats(self._moved(rows), *rest)

    def _moved(self, rows: slice) -> slice:
        start, stop, _ = rows.indices(self.shape[0])
        return slice(self._start + start, self._start + stop)


class _Interleaved(TensorView):
    def __init__(self, base: TensorView, index: int, of: int, unit: int) -> None:
        if base.shape[0] % (of * unit):
            raise CheckpointError(
                f"{base.origin} has {base.shape[0]} output features, which {of} interleaved parts of {unit} do not "
                "divide: config.json and the weights do not belong together"
            )
        self._base = base
        self._index, self._of, self._unit = index, of, unit
        self.origin = base.origin
        self.shape = (base.shape[0] // of, *base.shape[1:])

    def read(self, *index: slice) -> Tensor:
        rows, *rest = _full(index, len(self.shape))
        return self._own(self._base.read(self._around(rows), *rest), rows)

    def grid(self, *index: slice) -> Grid | None:
        rows, *rest = _full(index, len(self.shape))
        grid = self._base.grid(self._around(rows), *rest)
        if grid is None:
            return None
        numbers, scale = self._own(grid.numbers, rows), self._own(grid.scale, rows)
        zero_point = None if grid.zero_point is None else self._own(grid.zero_point, rows)
        return replace(grid, numbers=numbers, scale=scale, zero_point=zero_point)

    def formats(self, *index: slice) -> tuple[LinearFormat, ...]:
        """Those of a single row: a part's rows are no neighbours, so blocks of rows are not kept."""
        _, *rest = _full(index, len(self.shape))
        return self._base.formats(slice(0, 1), *rest)

    def _around(self, rows: slice) -> slice:
        """The units of fused rows that hold these."""
        start, stop, _ = rows.indices(self.shape[0])
        unit = self._of * self._unit
        return slice(start // self._unit * unit, -(-stop // self._unit) * unit)

    def _own(self, fused: Tensor, rows: slice) -> Tensor:
        """These rows among the units that hold them."""
        start, stop, _ = rows.indices(self.shape[0])
        units = fused.unflatten(0, (len(fused) // (self._of * self._unit), self._of, self._unit))
        own: Tensor = units[:, self._index].flatten(0, 1)[start % self._unit :][: stop - start]
        return own


class GroupView(TensorView):
    """One group of a tensor [groups, ...]."""

    def __init__(self, base: TensorView, group: int) -> None:
        self._base = base
        self._group = group
        self.origin = base.origin
        self.shape = base.shape[1:]

    def read(self, *index: slice) -> Tensor:
        return self._base.read(slice(self._group, self._group + 1), *_full(index, len(self.shape))).squeeze(0)


class Step(Protocol):
    """One step of a weight converter: what a rule does to a tensor on its way."""

    def apply(self, view: TensorView) -> TensorView: ...


@dataclass(frozen=True, slots=True)
class Transpose:
    """[in, out] becomes [out, in]; a bias stays as it is."""

    def apply(self, view: TensorView) -> TensorView:
        return _Transposed(view) if len(view.shape) > 1 else view


@dataclass(frozen=True, slots=True)
class Rows:
    """Output features start to stop of a fused tensor that has `of` in all."""

    start: int
    stop: int
    of: int

    def apply(self, view: TensorView) -> TensorView:
        return _Rows(view, self.start, self.stop, self.of)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Part `index` of a fused tensor whose rows run [units, of, unit], as when q, k, v alternate head by head."""

    index: int
    of: int
    unit: int

    def apply(self, view: TensorView) -> TensorView:
        return _Interleaved(view, self.index, self.of, self.unit)


def _full(index: tuple[slice, ...], dims: int) -> tuple[slice, ...]:
    return index + (WHOLE,) * (dims - len(index))
