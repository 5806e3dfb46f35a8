"""The extension host: finds plugins through entry points, checks each on its own, and keeps what they contributed.

A plugin is loaded, broken or disabled, with a reason, and a broken one never takes the others down. Nothing here
imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from plexor import __version__
from plexor.errors import ConfigError, PluginError
from plexor.extension import hookspecs
from plexor.extension.claims import KEYS, BrokenError, Claim, claims_of, offers_of, said

if TYPE_CHECKING:
    import fastapi

GROUP = "plexor"
CORE = "plexor"
BUILTIN = "plexor.extension.builtin"

State = Literal["loaded", "broken", "disabled"]


@dataclass(frozen=True, slots=True)
class PluginReport:
    """One plugin's standing.

    reason: one sentence on why it is not loaded, empty if it is. offers: keys by hook; for a broken plugin those that
    it claimed before it broke, none if it did not come so far. Hooks that return no data have no keys.
    """

    name: str
    distribution: str
    version: str
    state: State
    reason: str = ""
    offers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Found:
    """A plugin that is installed, not yet imported."""

    name: str
    distribution: str
    version: str
    requires: tuple[str, ...]
    load: Callable[[], object]


class Host:
    """Every plugin's standing and contributions, settled once by `Host.load`."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._reports: list[PluginReport] = []
        self._claims: dict[str, dict[str, Claim]] = {hook: {} for hook in KEYS}
        self._hooks: dict[str, Mapping[str, pluggy.HookImpl]] = {}

    @classmethod
    def load(cls, *, strict: bool, allow: frozenset[str] | None) -> Host:
        """Find and check every installed plugin, the core's own contributions first and then by name.

        strict: raise PluginError at the first broken plugin instead of reporting it. allow: only these are imported,
        None is all; ConfigError when it names one that is not installed.
        """
        host = cls(strict=strict)
        host._admit(_Found(CORE, CORE, __version__, (), lambda: import_module(BUILTIN)))
        if host._reports[0].state != "loaded":
            raise PluginError(f"plexor itself is damaged: {host._reports[0].reason}")
        found = sorted((_found(entry) for entry in entry_points(group=GROUP)), key=lambda f: (f.name, f.distribution))
        _check_allowed(allow, [plugin.name for plugin in found])
        for plugin in found:
            if allow is not None and plugin.name not in allow:
                host._reports.append(_report(plugin, "disabled", f"PLEXOR_PLUGINS does not list {plugin.name!r}"))
            else:
                host._admit(plugin)
        host._withdraw_orphans()
        return host

    @property
    def reports(self) -> tuple[PluginReport, ...]:
        """The core, then each installed plugin by name."""
        return tuple(self._reports)

    @property
    def claims(self) -> Mapping[str, Mapping[str, Claim]]:
        """What the loaded plugins brought: hook to key to claim."""
        return MappingProxyType({hook: MappingProxyType(claims) for hook, claims in self._claims.items()})

    def add_commands(self, subparsers: argparse._SubParsersAction[Any]) -> tuple[str, ...]:
        """Let every loaded plugin add its commands; returns a sentence for each that could not."""
        problems = []
        for plugin, hooks in self._hooks.items():
            if "commands" not in hooks:
                continue
            try:
                _call(hooks["commands"], subparsers=subparsers)
            except Exception as error:
                problem = f"plugin {plugin!r} could not add its commands ({said(error)}): update or uninstall it"
                if self._strict:
                    raise PluginError(problem) from error
                problems.append(problem)
        return tuple(problems)

    def add_routes(self, app: fastapi.FastAPI, engine: object, plugins: Iterable[str]) -> None:
        """Let the named plugins add their HTTP routes; PluginError when one has none or fails."""
        routes = {plugin: hooks["routes"] for plugin, hooks in self._hooks.items() if "routes" in hooks}
        for plugin in plugins:
            if plugin not in routes:
                hint = suggest(plugin, routes, "no loaded plugin does")
                raise PluginError(f"--enable-routes names {plugin!r}, which brings no routes: {hint}")
            try:
                _call(routes[plugin], app=app, engine=engine)
            except Exception as error:
                raise PluginError(f"plugin {plugin!r} could not add its routes ({said(error)}): update it") from error

    def _admit(self, plugin: _Found) -> None:
        """Take what a plugin brings if all of it is sound, else report why not: nothing of it is taken then."""
        try:
            if any(report.name == plugin.name for report in self._reports):
                raise BrokenError(f"another distribution brings a plugin {plugin.name!r} too: uninstall one of them")
            hooks = _implementations(plugin)
            claims = [claim for hook in KEYS if hook in hooks for claim in claims_of(hook, plugin.name, hooks[hook])]
            self._check_untaken(claims)
        except BrokenError as broken:
            if self._strict:
                raise PluginError(f"plugin {plugin.name!r} ({plugin.distribution}) is broken: {broken}") from broken
            self._reports.append(_report(plugin, "broken", str(broken), offers_of(broken.claims)))
            return
        for claim in claims:
            self._claims[claim.hook][claim.key] = claim
        self._hooks[plugin.name] = hooks
        self._reports.append(_report(plugin, "loaded", offers={**dict.fromkeys(hooks, ()), **offers_of(claims)}))

    def _check_untaken(self, claims: list[Claim]) -> None:
        mine: dict[tuple[str, str], Claim] = {}
        for claim in claims:
            first = self._claims[claim.hook].get(claim.key) or mine.get((claim.hook, claim.key))
            if first is not None:
                reason = f"{first.plugin!r} and {claim.plugin!r} both claim {claim.key!r} in {claim.hook}"
                raise BrokenError(f"{reason}: uninstall or disable one of them", tuple(claims))
            mine[claim.hook, claim.key] = claim

    def _withdraw_orphans(self) -> None:
        """Break plugins whose kernels serve ops that nobody declares, until none is left."""
        while orphan := self._orphan():
            reason = f"its kernel {orphan.key!r} is for an op that no loaded plugin declares: install the one that does"
            position = next(i for i, report in enumerate(self._reports) if report.name == orphan.plugin)
            report = self._reports[position]
            if self._strict:
                raise PluginError(f"plugin {report.name!r} ({report.distribution}) is broken: {reason}")
            self._reports[position] = dataclasses.replace(report, state="broken", reason=reason)
            del self._hooks[report.name]
            for hook, claims in self._claims.items():
                self._claims[hook] = {key: claim for key, claim in claims.items() if claim.plugin != report.name}

    def _orphan(self) -> Claim | None:
        kernels = self._claims["kernels"].values()
        return next((claim for claim in kernels if claim.spec.op not in self._claims["ops"]), None)


def _found(entry: EntryPoint) -> _Found:
    distribution = entry.dist
    if distribution is None:
        return _Found(entry.name, "unknown", "unknown", (), entry.load)
    name = canonicalize_name(distribution.metadata["Name"] or "unknown")
    version = distribution.metadata["Version"] or "unknown"
    return _Found(entry.name, name, version, tuple(distribution.requires or ()), entry.load)


def _report(
    plugin: _Found, state: State, reason: str = "", offers: Mapping[str, tuple[str, ...]] | None = None
) -> PluginReport:
    return PluginReport(plugin.name, plugin.distribution, plugin.version, state, reason, offers or {})


def _check_allowed(allow: frozenset[str] | None, installed: list[str]) -> None:
    for name in sorted(allow or ()):
        if name not in installed:
            hint = suggest(name, installed, "no plugin is installed")
            raise ConfigError(f"PLEXOR_PLUGINS lists {name!r}, which is not installed: {hint}")


def _check_requirement(plugin: _Found) -> None:
    """Compare the distribution's own requirement on plexor with the running version."""
    for text in plugin.requires:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) != CORE:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise BrokenError(
                f"it needs plexor {requirement.specifier} and this is {__version__}: "
                f"`pip install --upgrade plexor {plugin.distribution}`"
            )


def _implementations(plugin: _Found) -> Mapping[str, pluggy.HookImpl]:
    """Import a plugin and read its hooks with a pluggy manager of its own, so that nothing of it stays if it fails."""
    _check_requirement(plugin)
    try:
        module = plugin.load()
    except (Exception, SystemExit) as error:
        raise BrokenError(f"its import failed ({said(error)}): update or reinstall {plugin.distribution}") from error
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    known = sorted(vars(manager.hook))
    try:
        manager.register(module, plugin.name)
    except pluggy.PluginValidationError as error:
        raise BrokenError(f"a hook has the wrong signature: {str(error).strip().splitlines()[-1]}") from error
    callers = manager.get_hookcallers(module) or []
    if not callers:
        raise BrokenError("it implements no hook: mark its functions with @plexor.hookimpl")
    for caller in callers:
        if not caller.has_spec():
            raise BrokenError(f"it implements the unknown hook {caller.name!r}: {suggest(caller.name, known, '')}")
        _check_implementations(caller.name, caller.get_hookimpls())
    return {caller.name: caller.get_hookimpls()[0] for caller in callers}


def _check_implementations(hook: str, implementations: list[pluggy.HookImpl]) -> None:
    if len(implementations) > 1:
        raise BrokenError(f"it implements the hook {hook!r} {len(implementations)} times: let one return everything")
    if implementations[0].kwargnames:
        names = ", ".join(implementations[0].kwargnames)
        raise BrokenError(f"its hook {hook!r} gives {names} a default, which would always win: remove the default")
    if implementations[0].hookwrapper or implementations[0].wrapper:
        raise BrokenError(f"its hook {hook!r} is a wrapper: a hook returns its own data and never changes another's")


def _call(implementation: pluggy.HookImpl, **arguments: object) -> object:
    """Call with those of the hook's arguments that the implementation takes."""
    return implementation.function(*(arguments[name] for name in implementation.argnames))


def suggest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown name: the near one, else what there is, else `otherwise`."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known are {', '.join(names)}" if names else otherwise
