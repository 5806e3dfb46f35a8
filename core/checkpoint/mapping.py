"""The rules of a weight converter: which tensor of a checkpoint goes to which place of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from plexor.checkpoint.view import Step


@dataclass(frozen=True, slots=True)
class Rule:
    """Sends a module's tensors, or one tensor, of the checkpoint to a module of the model.

    source: dotted name in the checkpoint with placeholders for numbers, "model.layers.{layer}.self_attn.q_proj".
        It stands for every tensor of that module (weight, bias), which keep their last name; with `tensor` it is the
        full name of one tensor, which becomes target's tensor of that name.
    target: dotted name of the module in the model, with the same placeholders.
    part: which part of a linear layer it fills. group: the placeholder that numbers the group of an expert stack.
    stacked: the tensor holds all groups, [groups, ...].
    steps: what is done to the tensor on its way.
    """

    source: str
    target: str
    part: int = 0
    group: str | None = None
    stacked: bool = False
    tensor: str | None = None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Ignore:
    """Tensors that a checkpoint may hold and the model does not read (masks, tied copies, precomputed tables)."""

    source: str


WeightRule = Rule | Ignore


@dataclass(frozen=True, slots=True)
class Match:
    """A rule that matched a tensor: `target` with its numbers filled in, the tensor's name there, its group."""

    rule: WeightRule
    target: str
    tensor: str
    group: int


class RuleBook:
    """Compiled rules; `match(name)` finds every rule that a tensor name fits."""

    def __init__(self, rules: Iterable[WeightRule]) -> None:
        self._rules = [(rule, _pattern(rule)) for rule in rules]

    def match(self, name: str) -> tuple[Match, ...]:
        """Every rule that fits; several when a fused tensor feeds several parts."""
        found = []
        for rule, pattern in self._rules:
            hit = pattern.fullmatch(name)
            if hit is not None:
                found.append(_match(rule, hit.groupdict()))
        return tuple(found)

    def source_of(self, target: str, part: int, group: int, tensor: str) -> str:
        """The checkpoint's name for what fills a place of the model, for messages."""
        for rule, source in self._sources(target, part, group, tensor):
            return source if rule.tensor is not None else f"{source}.{tensor}"
        return f"{target}.{tensor}"

    def module_of(self, target: str, part: int, group: int) -> str | None:
        """The checkpoint's module whose weight fills this place and no other; None where no rule knows one."""
        for rule, source in self._sources(target, part, group, "weight"):
            if rule.tensor is None and not rule.stacked and not rule.steps:
                return source
        return None

    def unread(self) -> tuple[str, ...]:
        """Single tensors that a checkpoint may hold and the model does not read."""
        return tuple(rule.source for rule, _ in self._rules if isinstance(rule, Ignore) and "{" not in rule.source)

    def _sources(self, target: str, part: int, group: int, tensor: str) -> Iterator[tuple[Rule, str]]:
        """Every rule that fills a place, and its source there."""
        for rule, _ in self._rules:
            if isinstance(rule, Ignore) or rule.part != part or rule.tensor not in (None, tensor):
                continue
            hit = _template(rule.target).fullmatch(target)
            if hit is not None:
                numbers = {**hit.groupdict(), **({} if rule.group is None else {rule.group: str(group)})}
                yield rule, _filled(rule.source, numbers)


def under(prefix: str, target: str, rules: Iterable[WeightRule]) -> tuple[WeightRule, ...]:
    """The rules of a part of a model that the checkpoint keeps below `prefix` and the model has at `target`.

    Either may be empty for the top level.
    """
    moved: list[WeightRule] = []
    for rule in rules:
        source = _joined(prefix, rule.source)
        if isinstance(rule, Ignore):
            moved.append(Ignore(source))
        else:
            moved.append(replace(rule, source=source, target=_joined(target, rule.target)))
    return tuple(moved)


def _joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _template(text: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(text)))


def _filled(text: str, numbers: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda hit: numbers[hit.group(1)], text)


def _pattern(rule: WeightRule) -> re.Pattern[str]:
    whole = isinstance(rule, Ignore) or rule.tensor is not None
    return re.compile(_template(rule.source).pattern + ("" if whole else r"\.(?P<_tensor>\w+)"))


def _match(rule: WeightRule, numbers: Mapping[str, str]) -> Match:
    if isinstance(rule, Ignore):
        return Match(rule, "", "", 0)
    target = _filled(rule.target, numbers)
    tensor = rule.tensor if rule.tensor is not None else numbers["_tensor"]
    group = 0 if rule.group is None else int(numbers[rule.group])
    return Match(rule, target, tensor, group)
