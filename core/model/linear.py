"""Linear layers and expert stacks: shapes, parts and shards; how numbers are kept is the format's affair."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from plexor.checkpoint.view import TensorView
from plexor.errors import CheckpointError
from plexor.model.build import Build, facts
from plexor.model.format import FusingFormat, Fusion, GridFormat, LinearFormat, LinearShape
from plexor.model.norm import RMSNorm

Cut = Literal["out", "in", "none"]
"""Which features the ranks share out: "out" (column parallel), "in" (row parallel), "none" (each holds all)."""


AT_ONCE = 1 << 22
"""Numbers of a weight that are converted together; formats take several times their four bytes in float32 for it."""

LEAST_ROWS = 128


@dataclass(frozen=True, slots=True)
class Part:
    """Output features that come from one source (q, k, v; gate, up), in units that stay whole when cut.

    replicate: with fewer units than ranks, neighbours hold copies (heads of keys and values).
    """

    num_units: int
    unit_size: int = 1
    what: str = "output features"
    replicate: bool = False

    @property
    def size(self) -> int:
        return self.num_units * self.unit_size

    def rows(self, build: Build, cut: Cut) -> range:
        """The rows of the full part that this rank holds."""
        if cut != "out":
            return range(self.size)
        share = build.mesh.share_or_replicate if self.replicate else build.mesh.share
        units = share(self.num_units, self.what)
        return range(units.start * self.unit_size, units.stop * self.unit_size)


def rows_at_once(in_features: int) -> int:
    """How many rows of a weight are converted together: a power of two, so that none of a format's blocks is parted."""
    return 1 << max(LEAST_ROWS, AT_ONCE // max(in_features, 1)).bit_length() - 1


class LinearWeight(nn.Module):
    """The weight and bias that a format keeps for one layer or stack; the base of Linear and GroupedLinear.

    stored: the kept tensors by the names that the format gives them; the same tensors as the module's buffers.
    """

    def __init__(
        self,
        build: Build,
        in_features: int,
        parts: Sequence[Part],
        *,
        cut: Cut,
        bias: bool,
        groups: int,
        format: LinearFormat,
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.cut = cut
        self.groups = groups
        self.in_features = in_features
        self._format = format
        self._dtype = build.dtype
        self._rows = tuple(part.rows(build, cut) for part in parts)
        columns = build.mesh.share(in_features, "input features") if cut == "in" else range(in_features)
        self._columns = columns
        self.shape = LinearShape(sum(len(rows) for rows in self._rows), len(columns), groups)
        self._storage = format.storage(self.shape, build.dtype)
        lead = (groups,) if groups > 1 else ()
        for stored in self._storage:
            tensor = torch.empty((*lead, *stored.shape), dtype=stored.dtype, device=build.device)
            self.register_buffer(stored.name, tensor)
        if bias:
            self.register_buffer(
                "bias", torch.empty((*lead, self.shape.out_features), dtype=build.dtype, device=build.device)
            )
        else:
            self.bias: Tensor | None = None
        self._shared: dict[tuple[str, int], bytes] = {}
        self.stored: dict[str, Tensor] = {stored.name: getattr(self, stored.name) for stored in self._storage}

    @property
    def format(self) -> LinearFormat:
        """What keeps the weight: the build's format for it, or the dense one of a layer that must stay exact."""
        return self._format

    def pieces(self) -> set[tuple[int, int, str]]:
        """(part, group, suffix) of every tensor that a checkpoint must bring."""
        suffixes = ("weight",) if self.bias is None else ("weight", "bias")
        return {(p, g, s) for p in range(len(self.parts)) for g in range(self.groups) for s in suffixes}

    def stored_formats(self, piece: tuple[int, int, str], view: TensorView) -> tuple[LinearFormat, ...]:
        """Those that keep this rank's share of a weight as the checkpoint stores it; see TensorView.formats."""
        rows, columns = self._rows[piece[0]], self._columns
        return view.formats(slice(rows.start, rows.stop), slice(columns.start, columns.stop))

    def load_piece(self, piece: tuple[int, int, str], view: TensorView) -> None:
        """Read this rank's share of one dense tensor, convert it, and put it in its place."""
        part, group, suffix = piece
        if suffix == "bias":
            self._load_bias(part, group, view)
            return
        view.expect((self.parts[part].size, self.in_features))
        rows, columns = self._rows[part], self._columns
        where = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        offset = sum(len(rows) for rows in self._rows[:part])
        grid = view.grid(*where) if isinstance(self._format, GridFormat) else None
        if grid is not None and isinstance(self._format, GridFormat) and self._format.takes(grid):
            for some in self._slices(len(grid.numbers)):
                self._keep(self._format.keep(grid.rows(some)), view, group, offset + some.start)
            return
        self._convert(view, where, group, offset)

    def _convert(self, view: TensorView, where: tuple[slice, slice], group: int, offset: int) -> None:
        """Read and convert some rows at a time: what that takes on the way does not grow with the weight."""
        device = self.stored[self._storage[0].name].device
        rows, columns = where
        for some in self._slices(rows.stop - rows.start):
            part = slice(rows.start + some.start, rows.start + some.stop)
            weight = view.read_as(self._dtype, part, columns).to(device)
            self._keep(self._format.convert(weight), view, group, offset + some.start)

    def _slices(self, num_rows: int) -> Iterator[slice]:
        step = rows_at_once(len(self._columns))
        return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))

    def _keep(self, converted: dict[str, Tensor], view: TensorView, group: int, offset: int) -> None:
        """Put what a format made of some rows of a tensor, the first at `offset`, in its place."""
        kept = self._format.load(converted)
        for stored in self._storage:
            assert offset % stored.rows == 0, f"parts of {stored.name!r} are whole blocks of {stored.rows} rows"
            value = kept[stored.name]
            if stored.out_axis is None:
                self._check_shared(stored.name, value, view, group)
            self._place(self.stored[stored.name], value, group, stored.out_axis, offset // stored.rows)

    def _check_shared(self, name: str, value: Tensor, view: TensorView, group: int) -> None:
        """CheckpointError if parts that must share a tensor bring different ones."""
        content = hashlib.sha256(value.cpu().reshape(-1).view(torch.uint8).numpy().data).digest()
        if self._shared.setdefault((name, group), content) != content:
            raise CheckpointError(
                f"{view.origin} is stored with another {name!r} than a tensor that the model keeps in one layer with "
                "it, where one serves both: use --precision dense"
            )

    def _load_bias(self, part: int, group: int, view: TensorView) -> None:
        if self.bias is None:
            raise CheckpointError(f"{view.origin} is a bias of a layer that has none: check the model's config.json")
        view.expect((self.parts[part].size,))
        rows = self._rows[part]
        offset = sum(len(rows) for rows in self._rows[:part])
        bias = view.read_as(self._dtype, slice(rows.start, rows.stop))
        self._place(self.bias, bias, group, 0, offset)

    def _place(self, target: Tensor, value: Tensor, group: int, out_axis: int | None, offset: int) -> None:
        if self.groups > 1:
            target = target[group]
        if out_axis is not None:
            target = target.narrow(out_axis, offset, value.shape[out_axis])
        target.copy_(value)


class Linear(LinearWeight):
    """y = x Wᵀ + b over this rank's share, [T, in] -> [T, out]; a layer cut along "in" sums over the ranks."""

    def __init__(
        self,
        build: Build,
        in_features: int,
        parts: Sequence[Part],
        *,
        cut: Cut = "none",
        bias: bool = False,
    ) -> None:
        super().__init__(build, in_features, parts, cut=cut, bias=bias, groups=1, format=build.next_format())
        self._mesh = build.mesh
        self._multiply = self.format.bind(build.table, self.shape, build.dtype, build.device)

    def forward(self, x: Tensor) -> Tensor:
        y = self._multiply(x, self.stored)
        if self._sums_over_ranks():
            y = self._mesh.all_reduce(y)
        return y if self.bias is None else y + self.bias

    def after(self, build: Build, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        """The function x [T, in] -> self(norm(x)), in one op where there is one."""
        product = self.fused(build, "norm") if isinstance(norm, RMSNorm) else None
        if product is None or not isinstance(norm, RMSNorm):
            return lambda x: self(norm(x))
        return lambda x: product(x, norm.weight, norm.eps, self.stored, self.bias)

    def onto(self, build: Build) -> Callable[[Tensor, Tensor], Tensor]:
        """The function (x [T, in], residual [T, out]) -> residual + self(x), in one op where there is one.

        The residual may be overwritten.
        """
        product = None if self._sums_over_ranks() else self.fused(build, "add")
        if product is None:
            return lambda x, residual: residual + self(x)
        return lambda x, residual: product(x, self.stored, residual, self.bias)

    def fused(
        self, build: Build, fusion: Fusion, kv_dtype: torch.dtype | None = None, **sizes: int
    ) -> Callable[..., Tensor] | None:
        """The op that does this with the layer's weight; None where its format names none, or no kernel serves it here.

        sizes: what the op's kernels are chosen on besides the layer's own.
        """
        op = self._format.fused.get(fusion) if isinstance(self._format, FusingFormat) else None
        if op is None:
            return None
        sizes |= {"out_features": self.shape.out_features, "in_features": self.shape.in_features}
        if self.bias is not None:
            sizes["bias"] = 1
        return build.table.find(op, facts(build.device, build.dtype, kv_dtype, **sizes))

    def _sums_over_ranks(self) -> bool:
        return self.cut == "in" and self._mesh.size > 1


class GroupedLinear(LinearWeight):
    """An expert stack: rows sorted by group, each times its own group's weight, [M, in] -> [M, out].

    A stack cut along "in" returns this rank's partial sum: its user adds the ranks up once, after combining.
    rows_per_token: groups that each token visits, M / T; what a step costs is counted with it.
    """

    def __init__(
        self,
        build: Build,
        in_features: int,
        parts: Sequence[Part],
        *,
        groups: int,
        rows_per_token: int = 1,
        cut: Cut = "none",
    ) -> None:
        super().__init__(build, in_features, parts, cut=cut, bias=False, groups=groups, format=build.next_format())
        self.rows_per_token = rows_per_token
        self._multiply = self.format.bind_grouped(build.table, self.shape, build.dtype, build.device)

    def forward(self, x: Tensor, group_end: Tensor) -> Tensor:
        """group_end [groups] int32: one past the last row of each group."""
        return self._multiply(x, self.stored, group_end)
