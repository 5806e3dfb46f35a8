"""The loader: streams a checkpoint's tensors through the rules into a model, and accounts for each.

On a CPU they come one at a time. For a GPU several threads read ahead of the bus, each a tensor of its own: it reads it
onto the device, has it checked and converted there, and puts it in its place.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from plexor.checkpoint.mapping import Ignore, Match, Rule, RuleBook, WeightRule
from plexor.checkpoint.source import TensorSource
from plexor.checkpoint.staging import StagedSource
from plexor.checkpoint.view import GroupView, SourceView, TensorView
from plexor.errors import CheckpointError

Piece = tuple[int, int, str]
"""(part, group, tensor): what one tensor of a checkpoint fills in a module."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each tensor."""

CPU = torch.device("cpu")
MAX_UNDER_WAY = 2 << 30
"""Bytes of tensors that may be on the device in the checkpoint's form at once; one larger than that comes alone."""


@runtime_checkable
class Loadable(Protocol):
    """A module that knows how to read its own share of a tensor (linear layers, embeddings)."""

    def pieces(self) -> set[Piece]: ...

    def load_piece(self, piece: Piece, view: TensorView) -> None: ...


@runtime_checkable
class BringsRules(Protocol):
    """A model with another architecture's model inside, whose rules are known once that one has been found."""

    def weight_rules(self) -> tuple[WeightRule, ...]:
        """The inner model's rules, moved `under` its place."""
        ...


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did: tensors read, those that a rule ignored, bytes of both, and the dtypes that were met."""

    num_tensors: int
    num_ignored: int
    num_bytes: int
    dtypes: tuple[str, ...]


def load_weights(
    model: nn.Module,
    rules: Iterable[WeightRule],
    source: TensorSource,
    progress: Progress | None = None,
    *,
    device: torch.device = CPU,
    readers: int = 1,
    show: Callable[[TensorSource], TensorSource] | None = None,
) -> LoadReport:
    """Fill the model. CheckpointError for tensors that are missing, unused, of the wrong shape or type, or that fill
    one place twice; all of them are found by name and shape before the first is read, except wrong shapes.

    device: the model's. readers: threads that read at once, onto the device; one reads here, into the CPU's memory.
    show: makes of what is stored the tensors that the rules are about, where these differ.
    """
    if readers > 1:
        source = StagedSource(source, device, readers)
    if show is not None:
        source = show(source)
    planned = plan_weights(model, rules, source)
    names = source.names()
    total = sum(source.info(name).num_bytes for name in names)
    done = 0
    plan, targets = planned.placements, planned.targets
    filled = _fill_here(plan, targets) if readers == 1 else _fill_in_threads(plan, targets, device, readers)
    with closing(filled):
        for name in filled:
            done += source.info(name).num_bytes
            if progress is not None:
                progress(done, total)
    dtypes = {str(source.info(name).dtype).removeprefix("torch.") for name in names if plan[name]}
    num_ignored = len(planned.ignored)
    return LoadReport(len(names) - num_ignored, num_ignored, total, tuple(sorted(dtypes)))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor, or one group of a stacked one, goes."""

    target: str
    piece: Piece
    view: TensorView
    num_bytes: int
    rule: Rule


@dataclass(frozen=True, slots=True)
class Target:
    """A module of the model and the pieces that a checkpoint must bring for it."""

    module: Loadable
    pieces: frozenset[Piece]

    @property
    def ordered(self) -> list[Piece]:
        """The pieces in an order that is the same in every process."""
        return sorted(self.pieces)


def find_targets(model: nn.Module) -> dict[str, Target]:
    """Every module that holds weights, by its dotted name."""
    found: dict[str, Target] = {}
    for name, module in model.named_modules():
        if isinstance(module, Loadable):
            found[name] = Target(module, frozenset(module.pieces()))
        elif next(module.parameters(recurse=False), None) is not None:
            plain = _Plain(module)
            found[name] = Target(plain, frozenset(plain.pieces()))
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
            target.copy_(view.read_as(target.dtype))


def _placements(matches: Iterable[Match], source: TensorSource, name: str) -> Iterator[Placement]:
    """One for each part that a fused tensor feeds and for each group of a stacked one."""
    for match in matches:
        if not isinstance(match.rule, Rule):
            continue
        base: TensorView = SourceView(source, name)
        dtype = source.info(name).dtype
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"{base.origin} holds {str(dtype).removeprefix('torch.')}, where the model needs floating-point "
                "numbers: if the checkpoint is quantised, use one that is not"
            )
        if match.rule.stacked and not base.shape:
            raise CheckpointError(f"{base.origin} is a single number where the model needs a stack of tensors")
        groups = range(base.shape[0]) if match.rule.stacked else (match.group,)
        for group in groups:
            view: TensorView = GroupView(base, group) if match.rule.stacked else base
            for step in match.rule.steps:
                view = step.apply(view)
            num_bytes = math.prod(view.shape) * dtype.itemsize
            yield Placement(match.target, (match.rule.part, group, match.tensor), view, num_bytes, match.rule)


_Plan = Mapping[str, tuple[Placement, ...]]
"""Every tensor of the checkpoint, in the order of the disk, and the places that it fills."""


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Which places of a model the tensors of a source fill: all of them, each once.

    ignored: tensors that a rule says the model does not read.
    """

    targets: Mapping[str, Target]
    placements: _Plan
    ignored: frozenset[str]
    book: RuleBook


def plan_weights(model: nn.Module, rules: Iterable[WeightRule], source: TensorSource) -> WeightPlan:
    """The plan, from names alone; CheckpointError as `load_weights`, except for what only reading shows."""
    inner = model.weight_rules() if isinstance(model, BringsRules) else ()
    book = RuleBook((*rules, *inner))
    targets = find_targets(model)
    matches = {name: book.match(name) for name in source.names()}
    plan = {name: tuple(_placements(found, source, name)) for name, found in matches.items()}
    _check(book, targets, matches, plan)
    ignored = {name for name, found in matches.items() if any(isinstance(match.rule, Ignore) for match in found)}
    return WeightPlan(targets, plan, frozenset(ignored), book)


def _fill_here(plan: _Plan, targets: Mapping[str, Target]) -> Generator[str]:
    """Fill the places one after the other; yields each tensor's name once it has been used."""
    for name, placements in plan.items():
        for placement in placements:
            targets[placement.target].module.load_piece(placement.piece, placement.view)
        yield name


def _fill_in_threads(plan: _Plan, targets: Mapping[str, Target], device: torch.device, readers: int) -> Generator[str]:
    """Fill several places at a time; yields as `_fill_here` does, and raises what that would raise first."""
    room = _Room(MAX_UNDER_WAY)

    def fill(placement: Placement) -> None:
        with room.taken(placement.num_bytes):
            targets[placement.target].module.load_piece(placement.piece, placement.view)

    with ThreadPoolExecutor(readers, "plexor-reader", _work_on, (_numbered(device),)) as pool:
        under_way = {name: [pool.submit(fill, placement) for placement in plan[name]] for name in plan}
        try:
            for name, futures in under_way.items():
                for future in futures:
                    future.result()
                yield name
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _work_on(device: torch.device) -> None:
    """Kernels that a number format launches go to a thread's current GPU, which is the first unless set."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _numbered(device: torch.device) -> torch.device:
    """A GPU by its number, which a thread needs: "cuda" alone is what this thread works on, not another."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class _Room:
    """Lets in what fits, in the order of arrival; what is larger than all of it comes in alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._size)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify()


def _check(
    book: RuleBook,
    targets: Mapping[str, Target],
    matches: Mapping[str, tuple[Match, ...]],
    plan: _Plan,
) -> None:
    """CheckpointError unless every piece of the model is filled exactly once and every tensor is read or ignored."""
    filled: dict[tuple[str, Piece], str] = {}
    unused = [name for name, found in matches.items() if not found]
    for name, placements in plan.items():
        for placement in placements:
            place = placement.target, placement.piece
            target = targets.get(placement.target)
            if target is None or placement.piece not in target.pieces:
                unused.append(name)
            elif place in filled:
                raise CheckpointError(
                    f"{placement.view.origin} and tensor {filled[place]!r} are for the same place in the model: remove "
                    "the one that is a leftover"
                )
            filled[place] = name
    wanted = {(name, piece) for name, target in targets.items() for piece in target.pieces}
    lacking = [book.source_of(target, *piece) for target, piece in sorted(wanted - filled.keys())]
    missing = list(dict.fromkeys(lacking))  # a tensor that holds a stack, or several parts, is one
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensors that the model needs ({_some(missing)})")
    if unused:
        problems.append(f"has {len(unused)} that have no place in it ({_some(list(dict.fromkeys(unused)))})")
    if problems:
        raise CheckpointError(
            f"the checkpoint {' and '.join(problems)}: download it again, or check that config.json belongs to it"
        )


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
