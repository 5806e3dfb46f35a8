"""What the layouts share: a source that shows a dense weight wherever a layer of the checkpoint is stored rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plexor.api import CheckpointError, Grid, LinearFormat, TensorInfo, TensorSource
from plexor_quant.stored.scheme import Scheme

AT_ONCE = 1 << 22
"""Numbers that are unpacked together."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Codes:
    """Some rows and columns of a rounded weight.

    numbers: [rows, columns], int8 or e4m3. scale: float32 [rows, groups]; the first group begins `skipped` columns
    before the first column. zero_point: int32 [rows, groups] or None. group: int64 [columns], the group of each column
    where groups are not of consecutive ones, which is shown of all columns only. factor: float32 [columns] or None,
    by which all is multiplied.
    """

    numbers: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    group_size: int = 1
    skipped: int = 0
    group: Tensor | None = None
    factor: Tensor | None = None

    def dense(self) -> Tensor:
        """float32 [rows, columns]."""
        values = self.numbers.float()
        if self.zero_point is not None:
            values -= self._spread(self.zero_point)
        values *= self._spread(self.scale)
        return values if self.factor is None else values.mul_(self.factor)

    def grid(self, dtype: torch.dtype, bits: int) -> Grid | None:
        """The same as a Grid; None where groups are parted, or of several sizes."""
        size = self.numbers.shape[1] if self.scale.shape[-1] == 1 else self.group_size
        if self.skipped and self.scale.shape[-1] > 1:
            return None
        order = None
        if self.group is not None:
            order = self.group.argsort(stable=True)
            if not bool((self.group.bincount(minlength=self.scale.shape[-1]) == size).all()):
                return None
        moved = self.zero_point is not None and bool(self.zero_point.any())
        return Grid(self.numbers, self.scale, self.zero_point if moved else None, size, dtype, bits, order, self.factor)

    def _spread(self, each: Tensor) -> Tensor:
        """[rows, groups] -> [rows, columns] or, with one group, [rows, 1]."""
        if each.shape[-1] == 1:
            return each
        if self.group is not None:
            return each[:, self.group]
        wide = each.repeat_interleave(self.group_size, dim=-1)
        return wide[:, self.skipped : self.skipped + self.numbers.shape[-1]]


class Layer(Protocol):
    """One rounded weight [out, in] of a checkpoint.

    name: of the stored tensor in whose place the dense one is shown. scheme: how it was rounded.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def scheme(self) -> Scheme: ...

    def codes(self, rows: range, columns: range) -> Codes:
        """What is stored for these rows and columns; CheckpointError where it cannot be true."""
        ...


class RoundedSource:
    """A FormatSource: another source with `layers`, by shown name, in place of what is stored for them.

    hidden: what belongs to them besides the tensors that they are named after.
    """

    def __init__(self, source: TensorSource, layers: Mapping[str, Layer], hidden: frozenset[str]) -> None:
        self._source = source
        self._layers = layers
        shown = {layer.name: name for name, layer in layers.items()}
        self._names = tuple(shown.get(name, name) for name in source.names() if name not in hidden)

    def names(self) -> tuple[str, ...]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        layer = self._layers.get(name)
        if layer is None:
            return self._source.info(name)
        stored = self._source.info(layer.name)
        return TensorInfo(name, stored.file, torch.float32, layer.shape, stored.num_bytes)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        layer = self._layers.get(name)
        return self._source.read(name, index) if layer is None else layer.codes(*_spans(layer, index)).dense()

    def read_into(self, target: memoryview, name: str, index: tuple[slice, ...] = (), start: int = 0) -> None:
        if name not in self._layers:
            self._source.read_into(target, name, index, start)
            return
        content = self.read(name, index).cpu().reshape(-1).view(torch.uint8).numpy().data
        target[:] = content[start : start + len(target)]

    def grid(self, name: str, index: tuple[slice, ...] = ()) -> Grid | None:
        layer = self._layers.get(name)
        if layer is None:
            return None
        rows, columns = _spans(layer, index)
        if layer.scheme.ordered and len(columns) < layer.shape[1]:
            return None
        return layer.codes(rows, columns).grid(layer.scheme.dtype, layer.scheme.bits)

    def formats(self, name: str, index: tuple[slice, ...] = ()) -> tuple[LinearFormat, ...]:
        layer = self._layers.get(name)
        return () if layer is None else layer.scheme.formats(layer.shape, *_spans(layer, index))

    def close(self) -> None:
        self._source.close()


@dataclass(frozen=True, slots=True)
class Blocks:
    """A stored tensor [ceil(out / rows), ceil(in / columns)] with a number for each block of a weight [out, in].

    A number for the whole weight may have any shape of one element, numbers for rows may lack the last axis.
    """

    source: TensorSource
    name: str
    sizes: tuple[int, int]
    block: tuple[int, int]

    def check(self, dtypes: tuple[torch.dtype, ...]) -> None:
        """CheckpointError unless shape and dtype are as they should be."""
        rows, columns = (-(-size // each) for size, each in zip(self.sizes, self.block, strict=True))
        shape = self.source.info(self.name).shape
        also = ((), (1,)) if rows == columns == 1 else ((rows,),) if columns == 1 else ()
        expect(self.source, self.name, shape if shape in also else (rows, columns), dtypes)

    def read(self, rows: range, columns: range) -> Tensor:
        """[len(rows), groups]: those of the groups that these columns touch."""
        spans = [
            slice(p.start // each, -(-p.stop // each)) for p, each in zip((rows, columns), self.block, strict=True)
        ]
        stored = self.source.read(self.name, tuple(spans)[: len(self.source.info(self.name).shape)])
        stored = stored.float() if stored.is_floating_point() else stored  # one-byte floats cannot be indexed
        stored = stored.reshape(spans[0].stop - spans[0].start, -1)
        row = torch.arange(rows.start, rows.stop, device=stored.device) // self.block[0] - spans[0].start
        return stored[row]

    def scale(self, rows: range, columns: range) -> Tensor:
        """As `read`, of scales as float32; CheckpointError if one of them is no finite number from 0 on."""
        return checked_scale(self.source, self.name, self.read(rows, columns))


def groups_of(columns: range, size: int) -> range:
    """The groups of `size` input features that these columns touch."""
    return range(columns.start // size, -(-columns.stop // size))


def scale_of_groups(source: TensorSource, name: str, groups: range, rows: range) -> Tensor:
    """The part [rows, groups] of scales that lie as [groups, out], checked."""
    index = slice(groups.start, groups.stop), slice(rows.start, rows.stop)
    return checked_scale(source, name, source.read(name, index)).T.contiguous()


def checked_scale(source: TensorSource, name: str, scale: Tensor) -> Tensor:
    """A part of a tensor of scales as float32; CheckpointError if one of them is no finite number from 0 on."""
    scale = scale.float()
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise CheckpointError(
            f"tensor {name!r} of {source.info(name).file} holds scales that are NaN, infinite or negative: the weights "
            "are unusable, download the file again"
        )
    return scale


def expect(source: TensorSource, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """CheckpointError unless a stored tensor has this shape and one of these dtypes."""
    info = source.info(name)
    if info.shape != shape or info.dtype not in dtypes:
        due = " or ".join(_said(dtype) for dtype in dtypes)
        raise CheckpointError(
            f"tensor {name!r} of {info.file} is {_said(info.dtype)} {list(info.shape)} where quantization_config of "
            f"config.json asks for {due} {list(shape)}: they do not belong together"
        )


def companion(source: TensorSource, names: frozenset[str], of: str, name: str) -> str:
    """`name`, which must be there beside `of`."""
    if name not in names:
        raise CheckpointError(
            f"tensor {of!r} of {source.info(of).file} is stored quantised, but {name!r} is missing: download the "
            "checkpoint again"
        )
    return name


def group_block(source: TensorSource, of: str, in_features: int, group_size: int) -> tuple[int, int]:
    """The block of a scale for each group of a row; CheckpointError where groups do not divide the row."""
    if group_size < 1 or in_features % group_size:
        raise CheckpointError(
            f"tensor {of!r} of {source.info(of).file} has {in_features} input features, which groups of {group_size} "
            "do not divide: config.json and the weights do not belong together"
        )
    return 1, group_size


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits], the first number in the lowest bits, of 4 or 8."""
    packed = words.contiguous().view(torch.uint8)
    if bits == 8:
        return packed
    numbers = packed.new_empty(*packed.shape, 2)
    torch.bitwise_and(packed, 15, out=numbers[..., 0])
    torch.bitwise_right_shift(packed, 4, out=numbers[..., 1])
    return numbers.flatten(-2)


def centred(numbers: Tensor, bits: int) -> Tensor:
    """uint8 from 0 on -> int8 with the middle, 2^(bits - 1), at zero; in place."""
    return numbers.sub_(1 << (bits - 1)).view(torch.int8)


def read_packed(source: TensorSource, name: str, others: range, packed: range, axis: int, bits: int) -> Tensor:
    """uint8 [others, packed] from 0 on, of words that hold consecutive numbers along `axis` of a stored matrix."""
    each = 32 // bits
    words = slice(packed.start // each, -(-packed.stop // each))
    index = (words, span(others)) if axis == 0 else (span(others), words)
    stored = source.read(name, index)
    start = packed.start - words.start * each
    numbers = torch.empty(len(others), len(packed), dtype=torch.uint8, device=stored.device)
    for some in some_rows(len(others), len(packed)):
        part = stored[:, some].T if axis == 0 else stored[some]
        numbers[some] = unpacked(part, bits)[:, start : start + len(packed)]
    return numbers


def some_rows(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Rows that are unpacked together, so that what it takes does not grow with the weight."""
    step = max(AT_ONCE // max(num_columns, 1), 1)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def is_ordered(source: TensorSource, name: str, in_features: int, size: int) -> bool:
    """Whether groups are of other input features than `size` consecutive ones; CheckpointError if of another number."""
    expect(source, name, (in_features,), (torch.int32, torch.int64))
    num_groups = -(-in_features // size)
    group = read_order(source, name, range(in_features), num_groups).cpu()
    consecutive = torch.arange(in_features) // size
    if not torch.equal(group.sort().values, consecutive):
        raise CheckpointError(
            f"tensor {name!r} of {source.info(name).file} gives groups other than {size} input features each: the file "
            "is damaged, download it again"
        )
    return not torch.equal(group, consecutive)


def read_order(source: TensorSource, name: str, columns: range, num_groups: int) -> Tensor:
    """int64 [columns], the group of each of these input features; CheckpointError for a group that there is not."""
    group = source.read(name, (slice(columns.start, columns.stop),)).long()
    if bool(((group < 0) | (group >= num_groups)).any()):
        raise CheckpointError(
            f"tensor {name!r} of {source.info(name).file} names groups beyond the {num_groups} that have scales: the "
            "file is damaged, download it again"
        )
    return group


def sizes_of(source: TensorSource, name: str) -> tuple[int, int]:
    """The two sizes of a stored matrix."""
    info = source.info(name)
    if len(info.shape) != 2:
        raise CheckpointError(
            f"tensor {name!r} of {info.file} is stored quantised with {len(info.shape)} axes, where only matrices are "
            "read: use a checkpoint that stores each expert on its own"
        )
    return info.shape[0], info.shape[1]


def span(part: range) -> slice:
    return slice(part.start, part.stop)


def _spans(layer: Layer, index: tuple[slice, ...]) -> tuple[range, range]:
    whole = (*index, *(slice(None),) * (2 - len(index)))
    rows, columns = (range(size)[part] for size, part in zip(layer.shape, whole, strict=True))
    return rows, columns


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
