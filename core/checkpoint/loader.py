"""The loader: streams a checkpoint's tensors through the rules into a model, one at a time, and accounts for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from plexor.checkpoint.mapping import Ignore, Match, Rule, RuleBook, WeightRule
from plexor.checkpoint.source import TensorSource
from plexor.checkpoint.view import GroupView, SourceView, TensorView
from plexor.errors import CheckpointError

Piece = tuple[int, int, str]
"""(part, group, tensor): what one tensor of a checkpoint fills in a module."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each tensor."""


@runtime_checkable
class Loadable(Protocol):
    """A module that knows how to read its own share of a tensor (linear layers, embeddings)."""

    def pieces(self) -> set[Piece]: ...

    def load_piece(self, piece: Piece, view: TensorView) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did: tensors read, those that a rule ignored, bytes of both, and the dtypes that were met."""

    num_tensors: int
    num_ignored: int
    num_bytes: int
    dtypes: tuple[str, ...]


def load_weights(
    model: nn.Module, rules: Iterable[WeightRule], source: TensorSource, progress: Progress | None = None
) -> LoadReport:
    """Fill the model. CheckpointError names every missing, unused or misshaped tensor."""
    book = RuleBook(rules)
    targets = _targets(model)
    filled: set[tuple[str, Piece]] = set()
    unused: list[str] = []
    ignored = 0
    dtypes: set[str] = set()
    names = source.names()
    total = sum(source.info(name).num_bytes for name in names)
    done = 0
    for name in names:
        matches = book.match(name)
        done += source.info(name).num_bytes
        ignored += any(isinstance(match.rule, Ignore) for match in matches)
        if not matches:
            unused.append(name)
        for target, piece, view in _placements(matches, source, name):
            _load(targets, target, piece, view)
            filled.add((target, piece))
            dtypes.add(str(source.info(name).dtype).removeprefix("torch."))
        if progress is not None:
            progress(done, total)
    wanted = {(name, piece) for name, target in targets.items() for piece in target.pieces}
    _complain(book, unused, sorted(wanted - filled))
    return LoadReport(len(names) - ignored, ignored, total, tuple(sorted(dtypes)))


@dataclass(frozen=True, slots=True)
class _Target:
    """A module of the model and the pieces that a checkpoint must bring for it."""

    module: Loadable
    pieces: frozenset[Piece]


def _targets(model: nn.Module) -> dict[str, _Target]:
    """Every module that holds weights, by its dotted name."""
    found: dict[str, _Target] = {}
    for name, module in model.named_modules():
        if isinstance(module, Loadable):
            found[name] = _Target(module, frozenset(module.pieces()))
        elif next(module.parameters(recurse=False), None) is not None:
            plain = _Plain(module)
            found[name] = _Target(plain, frozenset(plain.pieces()))
    return found


class _Plain:
    """Weights that every rank holds whole (norms, small embeddings)."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))

    def pieces(self) -> set[Piece]:
        return {(0, 0, name) for name in self._tensors}

    def load_piece(self, piece: Piece, view: TensorView) -> None:
        target = self._tensors[piece[2]]
        view.expect(tuple(target.shape))
        with torch.no_grad():
            target.copy_(view.read())


def _placements(matches: Iterable[Match], source: TensorSource, name: str) -> Iterator[tuple[str, Piece, TensorView]]:
    """Where a tensor goes: (module, piece, view), one for each group of a stacked tensor."""
    for match in matches:
        if not isinstance(match.rule, Rule):
            continue
        base: TensorView = SourceView(source, name)
        groups = range(base.shape[0]) if match.rule.stacked else (match.group,)
        for group in groups:
            view: TensorView = GroupView(base, group) if match.rule.stacked else base
            for step in match.rule.steps:
                view = step.apply(view)
            yield match.target, (match.rule.part, group, match.tensor), view


def _load(targets: dict[str, _Target], name: str, piece: Piece, view: TensorView) -> None:
    target = targets.get(name)
    if target is None or piece not in target.pieces:
        raise CheckpointError(
            f"{view.origin} has no place in the model that config.json describes: the two do not belong together"
        )
    target.module.load_piece(piece, view)


def _complain(book: RuleBook, unused: list[str], missing: list[tuple[str, Piece]]) -> None:
    if missing:
        names = [book.source_of(target, *piece) for target, piece in missing]
        raise CheckpointError(
            f"{len(missing)} tensors that the model needs are not in the checkpoint ({_some(names)}): "
            "download it again, or check that config.json belongs to it"
        )
    if unused:
        raise CheckpointError(
            f"{len(unused)} tensors of the checkpoint have no place in the model ({_some(unused)}): "
            "check that config.json belongs to it"
        )


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
