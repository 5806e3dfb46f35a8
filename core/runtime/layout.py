"""What a checkpoint of rounded weights holds: tensors that stay, and matrices made of rows of the model's weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from plexor.checkpoint.loader import Placement, WeightPlan
from plexor.checkpoint.source import TensorSource
from plexor.checkpoint.view import SourceView, TensorView, Transpose
from plexor.checkpoint.writer import PlannedTensor
from plexor.errors import CheckpointError, ConfigError
from plexor.model.decoder import Decoder
from plexor.model.format import LinearFormat, LinearShape
from plexor.model.linear import LinearWeight
from plexor.model.norm import RMSNorm
from plexor.model.written import WrittenFormat
from plexor.runtime.loading import BuiltModel

Stored = Mapping[str, Tensor]
"""What a format keeps of a weight, by its names."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows of a module's weight, from `start` on, and where each of them lies in a matrix of the checkpoint.

    group: of a stack, whose tensors have their groups in front; None for a linear layer.
    """

    target: str
    group: int | None
    start: int
    rows: Tensor

    def cut(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor that is kept of the whole module."""
        own = tensor if self.group is None else tensor[self.group]
        return own[self.start : self.start + len(self.rows)]


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A weight that is rounded. name: of the module that it is written as; view: dense, [out, in]."""

    name: str
    view: TensorView
    pieces: tuple[Piece, ...]

    def assembled(self, kept: Mapping[str, Stored]) -> dict[str, Tensor]:
        """Of what is kept of whole modules, by module, this matrix's rows in its own order."""
        order = torch.cat([piece.rows for piece in self.pieces]).argsort()
        names = kept[self.pieces[0].target]
        return {
            name: self._ordered([piece.cut(kept[piece.target][name]) for piece in self.pieces], order) for name in names
        }

    def _ordered(self, parts: Sequence[Tensor], order: Tensor) -> Tensor:
        if len(parts) == 1 and torch.equal(order, torch.arange(len(order))):
            return parts[0]
        # One-byte floats cannot be indexed.
        whole = torch.cat([part.view(torch.uint8) if part.itemsize == 1 else part for part in parts])
        return whole[order.to(whole.device)].view(parts[0].dtype)


@dataclass(frozen=True, slots=True)
class Gain:
    """A tensor of gains that calibration may change: its name, the norm in the model, and the dtype that it gets."""

    name: str
    target: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What is written: matrices that are rounded, gains that may change, and tensors that stay, by name.

    ignored: modules of the checkpoint whose weight stays dense where others are rounded.
    """

    planned: tuple[PlannedTensor, ...]
    matrices: tuple[Matrix, ...]
    gains: tuple[Gain, ...]
    copied: tuple[str, ...]
    ignored: tuple[str, ...]


class LayoutPlanner:
    """Lays out a checkpoint of a model whose weights a format rounds and a WrittenFormat names."""

    def __init__(
        self,
        built: BuiltModel,
        plan: WeightPlan,
        source: TensorSource,
        format: LinearFormat,
        written: WrittenFormat,
        dense: Sequence[str] = (),
    ) -> None:
        """dense: patterns of modules of the checkpoint, as fnmatch reads them, that stay as they are."""
        self._built = built
        self._plan = plan
        self._source = source
        self._format = format
        self._written = written
        self._dense = dense
        self._modules = dict(built.module.named_modules())
        self._decoder = find_decoder(built.module)

    def lay_out(self, gain_dtype: torch.dtype | None) -> Layout:
        """gain_dtype: in which gains of norms in decoder layers must fit; None where they stay as they are.

        ConfigError where nothing is to be rounded, or parts of a layer are to be dense; CheckpointError for weights
        that cannot be written.
        """
        self._check_dense()
        planned: list[PlannedTensor] = []
        matrices: list[Matrix] = []
        copied: list[str] = []
        norms = self._norms()
        gains: list[Gain] = []
        ignored = [name.removesuffix(".weight") for name in self._plan.book.unread() if name.endswith(".weight")]
        for name, placements in self._plan.placements.items():
            if self._takes_precision(placements) and not self._stays_dense(name):
                made = list(self._matrices(name, placements))
                planned.extend(tensor for matrix in made for tensor in self._planned(matrix))
                matrices.extend(made)
                continue
            info = self._source.info(name)
            if gain_dtype is not None and placements and placements[0].target in norms:
                gains.append(Gain(name, placements[0].target, torch.promote_types(info.dtype, gain_dtype)))
                planned.append(PlannedTensor(name, gains[-1].dtype, info.shape))
                continue
            planned.append(PlannedTensor(name, info.dtype, info.shape))
            copied.append(name)
            if self._is_dense_linear(name, placements):
                ignored.append(name.rpartition(".")[0])
        if not matrices:
            raise ConfigError(
                f"{self._built.architecture.name} has no weight that a precision rounds: run the checkpoint as it is"
            )
        return Layout(tuple(planned), tuple(matrices), tuple(gains), tuple(copied), tuple(dict.fromkeys(ignored)))

    def _check_dense(self) -> None:
        """Patterns must name something, and all or nothing of what the model multiplies in one."""
        weights = {name: each for name, each in self._plan.placements.items() if self._takes_precision(each)}
        modules = [name.removesuffix(".weight") for name in weights]
        for pattern in self._dense:
            if not fnmatch.filter(modules, pattern):
                near = get_close_matches(pattern, modules, n=1) or modules[:1]
                raise ConfigError(
                    f"no layer that would be rounded is called {pattern!r}: names are such as {', '.join(near)}"
                )
        chosen = {name for name in weights if self._stays_dense(name)}
        parted = {each.target for name in chosen for each in weights[name]}
        for name, placements in weights.items():
            if name not in chosen and any(each.target in parted for each in placements):
                raise ConfigError(
                    f"{name.removesuffix('.weight')} is multiplied together with layers that are to stay dense: name "
                    "all of them or none"
                )

    def _stays_dense(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in self._dense)

    def _takes_precision(self, placements: Sequence[Placement]) -> bool:
        """Whether a tensor is the weight of linear layers that a precision may touch."""
        found = {each.piece[2] == "weight" and self._may_round(each.target) for each in placements}
        assert len(found) < 2, f"a tensor of {placements[0].target} is to be rounded in parts only"
        return found == {True}

    def _may_round(self, target: str) -> bool:
        module = self._modules[target]
        return isinstance(module, LinearWeight) and module.format is self._built.build.format

    def _is_dense_linear(self, name: str, placements: Sequence[Placement]) -> bool:
        """Whether a tensor that stays is the weight of a linear layer or of the head."""
        head = None if self._decoder is None else self._decoder.head
        targets = [self._modules[each.target] for each in placements if each.piece[2] == "weight"]
        return name.endswith(".weight") and any(isinstance(each, LinearWeight) or each is head for each in targets)

    def _norms(self) -> set[str]:
        """Those in the decoder's layers whose gains can take up factors, by their names in the model."""
        layers = () if self._decoder is None else self._decoder.layers
        found = {module for layer in layers for module in layer.modules() if isinstance(module, RMSNorm)}
        return {name for name, module in self._modules.items() if module in found}

    def _matrices(self, name: str, placements: Sequence[Placement]) -> Iterator[Matrix]:
        """The matrices that are written for one tensor: one, or one for each expert's part of a stack."""
        if any(isinstance(step, Transpose) for each in placements for step in each.rule.steps):
            raise CheckpointError(
                f"{placements[0].view.origin} lies transposed, as [in, out], which checkpoints of rounded weights do "
                "not: leave it as it is and round while loading, with --precision of the other commands"
            )
        if not placements[0].rule.stacked:
            shape = self._source.info(name).shape
            pieces = tuple(self._piece(each, _row_numbers(each, shape)) for each in placements)
            yield Matrix(name.rpartition(".")[0], SourceView(self._source, name), pieces)
            return
        for each in placements:
            part, group, _ = each.piece
            module = self._plan.book.module_of(each.target, part, group)
            if module is None:
                raise CheckpointError(
                    f"{each.view.origin} holds all experts, which checkpoints of rounded weights hold one by one: use "
                    "the checkpoint with tensors of each expert"
                )
            yield Matrix(module, each.view, (self._piece(each, torch.arange(each.view.shape[0])),))

    def _piece(self, placement: Placement, rows: Tensor) -> Piece:
        module = self._modules[placement.target]
        assert isinstance(module, LinearWeight)
        part, group, _ = placement.piece
        start = sum(each.size for each in module.parts[:part])
        return Piece(placement.target, group if module.groups > 1 else None, start, rows)

    def _planned(self, matrix: Matrix) -> Iterator[PlannedTensor]:
        out_features, in_features = matrix.view.shape
        reason = self._written.refuses(in_features)
        if reason is not None:
            raise CheckpointError(f"{matrix.view.origin} {reason}")
        storage = self._format.storage(LinearShape(out_features, in_features), self._built.build.dtype)
        assert all(stored.out_axis == 0 for stored in storage), "rows of a matrix are kept on their own"
        kept = {stored.name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for stored in storage}
        for last, tensor in self._written.tensors(kept, in_features).items():
            yield PlannedTensor(f"{matrix.name}.{last}", tensor.dtype, tuple(tensor.shape))


def find_decoder(model: nn.Module) -> Decoder | None:
    """The stack that reads text, None in a model that has none."""
    return next((module for module in model.modules() if isinstance(module, Decoder)), None)


class _RowNumbers(TensorView):
    """A tensor [rows, ...] that holds the number of its row everywhere: what a rule's steps make of it tells rows."""

    def __init__(self, origin: str, shape: tuple[int, ...]) -> None:
        self.origin = origin
        self.shape = shape

    def read(self, *index: slice) -> Tensor:
        rows, *rest = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        sizes = [len(range(size)[part]) for size, part in zip(self.shape[1:], rest, strict=True)]
        return torch.arange(self.shape[0])[rows].view(-1, *(1 for _ in sizes)).expand(-1, *sizes)


def _row_numbers(placement: Placement, shape: tuple[int, ...]) -> Tensor:
    """Which rows of a tensor of this shape a placement's view shows, [n]."""
    view: TensorView = _RowNumbers(placement.view.origin, shape)
    for step in placement.rule.steps:
        view = step.apply(view)
    return view.read(slice(0, view.shape[0]), slice(0, 1)).squeeze(1)
