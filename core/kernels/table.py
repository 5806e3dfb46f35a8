"""The kernel table: which provider serves an op on given facts, chosen once when a model is built, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

from plexor.errors import ConfigError, PluginError
from plexor.extension.specs import Facts, Kernel, Op, Target

REFERENCE = "reference"


def resolve(target: Target) -> Any:
    """The object that "package.module:attribute" names; PluginError when it is not there."""
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"{target!r} cannot be loaded ({error}): reinstall the plugin that declares it") from error


def bound(kernel: Kernel) -> Callable[..., Any]:
    """The function that a kernel names, or a new instance of the class, or of the partial of one, that it names."""
    provider = resolve(kernel.load)
    made = provider.func if isinstance(provider, partial) else provider
    function: Callable[..., Any] = provider() if isinstance(made, type) else provider
    return function


@dataclass(frozen=True, slots=True)
class Verdict:
    """One provider's standing in a choice; `reason` is empty for the winner."""

    provider: str
    priority: int
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome for one op on one set of facts."""

    op: str
    facts: Facts
    winner: str
    verdicts: tuple[Verdict, ...]


class KernelTable:
    """Binds ops to providers; records each choice for `plexor explain`."""

    def __init__(
        self, ops: Iterable[Op], kernels: Iterable[Kernel], overrides: Mapping[str, str] | None = None
    ) -> None:
        """overrides: op name to provider name, from `--kernel rms_norm=reference`."""
        self._ops = {op.name: op for op in ops}
        self._kernels: dict[str, list[Kernel]] = {name: [] for name in self._ops}
        for kernel in kernels:
            if kernel.op not in self._ops:
                raise PluginError(
                    f"kernel {kernel.provider!r} provides the unknown op {kernel.op!r}: declare the op first"
                )
            self._kernels[kernel.op].append(kernel)
        self._overrides = dict(overrides or {})
        for name, provider in self._overrides.items():
            self._check_override(name, provider)
        self._choices: dict[tuple[str, str], Choice] = {}

    @property
    def ops(self) -> Mapping[str, Op]:
        return self._ops

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every distinct choice made so far, in the order it was first made."""
        return tuple(self._choices.values())

    def kernels(self, op: str) -> tuple[Kernel, ...]:
        """The providers of an op besides the reference, highest priority first."""
        return tuple(sorted(self._kernels[op], key=lambda kernel: (-kernel.priority, kernel.provider)))

    def bind(self, op: str, facts: Facts) -> Callable[..., Any]:
        """The winner's function for these facts; of a provider that is a class, an instance for this binding alone."""
        choice = self.explain(op, facts)
        self._choices.setdefault((op, repr(facts)), choice)
        if choice.winner == REFERENCE:
            return self.reference(op)
        kernel = next(kernel for kernel in self._kernels[op] if kernel.provider == choice.winner)
        return bound(kernel)

    def find(self, op: str, facts: Facts) -> Callable[..., Any] | None:
        """As bind, but None where only the reference is left: for an op whose work the caller can also do in steps of
        other ops, which may have better kernels here than the reference is.
        """
        return None if self.explain(op, facts).winner == REFERENCE else self.bind(op, facts)

    def reference(self, op: str) -> Callable[..., Any]:
        """The op's definition in plain torch."""
        function: Callable[..., Any] = resolve(self._op(op).reference)
        return function

    def explain(self, op: str, facts: Facts) -> Choice:
        """Who wins on these facts, and why each other provider lost."""
        self._op(op)
        wanted = self._overrides.get(op)
        verdicts: list[Verdict] = []
        winner: Kernel | None = None
        for kernel in self.kernels(op):
            reason = _refusal(kernel, facts)
            if not reason and wanted is not None and kernel.provider != wanted:
                reason = f"--kernel {op}={wanted}"
            if not reason and winner is not None:
                if winner.priority == kernel.priority:
                    raise PluginError(
                        f"kernels {winner.provider!r} and {kernel.provider!r} both claim {op!r} at priority "
                        f"{kernel.priority}: give one of them another priority, or choose with --kernel {op}=NAME"
                    )
                reason = f"priority {kernel.priority} is below {winner.provider}'s {winner.priority}"
            if not reason:
                winner = kernel
            verdicts.append(Verdict(kernel.provider, kernel.priority, reason))
        if winner is None and wanted not in (None, REFERENCE):
            reason = next(verdict.reason for verdict in verdicts if verdict.provider == wanted)
            raise ConfigError(f"--kernel {op}={wanted} cannot serve here ({reason}): choose another or leave it out")
        lost = "" if winner is None else f"priority 0 is below {winner.provider}'s {winner.priority}"
        verdicts.append(Verdict(REFERENCE, 0, lost))
        return Choice(op, facts, REFERENCE if winner is None else winner.provider, tuple(verdicts))

    def _op(self, name: str) -> Op:
        if name not in self._ops:
            raise PluginError(f"no plugin declares the op {name!r}: install the plugin that needs it again")
        return self._ops[name]

    def _check_override(self, name: str, provider: str) -> None:
        if name not in self._ops:
            near = get_close_matches(name, self._ops, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(self._ops))}"
            raise ConfigError(f"--kernel names the unknown op {name!r}: {hint}")
        providers = [REFERENCE, *(kernel.provider for kernel in self.kernels(name))]
        if provider not in providers:
            raise ConfigError(f"--kernel {name}={provider}: no such provider, choose one of {', '.join(providers)}")


def _refusal(kernel: Kernel, facts: Facts) -> str:
    if facts.device not in kernel.devices:
        return f"runs on {', '.join(sorted(kernel.devices))}, not on {facts.device}"
    if kernel.capability is not None and (facts.capability is None or facts.capability < kernel.capability):
        have = "none" if facts.capability is None else "{}.{}".format(*facts.capability)
        return "needs compute capability {}.{}".format(*kernel.capability) + f", this device has {have}"
    if facts.dtype not in kernel.dtypes:
        return f"takes {', '.join(sorted(kernel.dtypes))}, not {facts.dtype}"
    if facts.kv_dtype is not None and facts.kv_dtype not in kernel.kv_dtypes:
        return f"does not list the cache storage {facts.kv_dtype}"
    if kernel.refuses is None:
        return ""
    refuses = resolve(kernel.refuses) if isinstance(kernel.refuses, str) else kernel.refuses
    return refuses(facts) or ""
