"""The catalog: read-only tables of everything the loaded plugins brought, and errors that say how to get the rest.

Every process builds one, once: in a step nothing is looked up here. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from plexor.config import Environment
from plexor.errors import CheckpointError, ConfigError, PlexorError, PluginError
from plexor.extension.host import Host, PluginReport, suggest
from plexor.extension.index import known_keys, offering, read_index
from plexor.extension.specs import (
    Architecture,
    Checkpoint,
    CheckpointFormat,
    InputProcessor,
    Kernel,
    KVFormat,
    Layer,
    Observer,
    Op,
    Precision,
    StoredWeights,
)
from plexor.kernels.table import KernelTable

if TYPE_CHECKING:
    import fastapi

_CALLED: Mapping[str, str] = MappingProxyType(
    {
        "architectures": "architecture",
        "layers": "layer",
        "ops": "op",
        "kernels": "kernel",
        "precisions": "precision",
        "kv_formats": "KV format",
        "checkpoint_formats": "checkpoint format",
        "stored_weights": "layout of stored weights",
        "input_processors": "input processor",
        "checkpoints": "checkpoint",
        "observers": "observer",
    }
)
"""What one entry of a hook is called in a message."""


class Catalog:
    """What this process has to build with; keys are those of the hooks, joined by "/" where they have two parts."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._index = read_index()

    @classmethod
    def load(cls, *, strict: bool = False, allow: frozenset[str] | None = None) -> Catalog:
        """From the installed plugins.

        strict: raise PluginError at a broken plugin. allow: import only these; None follows `PLEXOR_PLUGINS`.
        """
        return cls(Host.load(strict=strict, allow=Environment.read().plugins if allow is None else allow))

    @property
    def architectures(self) -> Mapping[str, Architecture]:
        return self._table("architectures")

    @property
    def layers(self) -> Mapping[str, Layer]:
        """By "slot/name"."""
        return self._table("layers")

    @property
    def ops(self) -> Mapping[str, Op]:
        return self._table("ops")

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """By "op/provider"."""
        return self._table("kernels")

    @property
    def precisions(self) -> Mapping[str, Precision]:
        return self._table("precisions")

    @property
    def kv_formats(self) -> Mapping[str, KVFormat]:
        return self._table("kv_formats")

    @property
    def checkpoint_formats(self) -> Mapping[str, CheckpointFormat]:
        return self._table("checkpoint_formats")

    @property
    def stored_weights(self) -> Mapping[str, StoredWeights]:
        return self._table("stored_weights")

    @property
    def input_processors(self) -> Mapping[str, InputProcessor]:
        """By "architecture/kind"."""
        return self._table("input_processors")

    @property
    def checkpoints(self) -> Mapping[str, Checkpoint]:
        return self._table("checkpoints")

    @property
    def observers(self) -> Mapping[str, Observer]:
        return self._table("observers")

    @property
    def reports(self) -> tuple[PluginReport, ...]:
        """Every plugin's standing, the core first."""
        return self._host.reports

    @property
    def identity(self) -> tuple[tuple[str, str], ...]:
        """Name and version of everything loaded: ranks of one engine must agree on it."""
        return tuple((report.name, report.version) for report in self.reports if report.state == "loaded")

    def owner(self, hook: str, key: str) -> PluginReport:
        """The plugin that brought a key which is in the catalog."""
        name = self._host.claims[hook][key].plugin
        return next(report for report in self.reports if report.name == name)

    def architecture(self, name: str) -> Architecture:
        """The architecture with what it needs from other plugins present; PluginError names what is missing."""
        architecture: Architecture = self._get("architectures", name)
        for need in architecture.needs:
            hook, _, key = need.partition(":")
            if key not in self._host.claims[hook]:
                owner = self.owner("architectures", name)
                raise PluginError(f"plugin {owner.name!r} needs more for {name}: {self._missing(hook, key)}")
        return architecture

    def layer(self, slot: str, name: str) -> Layer:
        layer: Layer = self._get("layers", f"{slot}/{name}")
        return layer

    def op(self, name: str) -> Op:
        op: Op = self._get("ops", name)
        return op

    def precision(self, name: str) -> Precision:
        precision: Precision = self._get("precisions", name)
        return precision

    def kv_format(self, name: str) -> KVFormat:
        kv_format: KVFormat = self._get("kv_formats", name)
        return kv_format

    def checkpoint_format(self, name: str) -> CheckpointFormat:
        checkpoint_format: CheckpointFormat = self._get("checkpoint_formats", name)
        return checkpoint_format

    def input_processor(self, architecture: str, kind: str) -> InputProcessor:
        """ConfigError when the architecture takes no media of this kind."""
        processor: InputProcessor = self._get("input_processors", f"{architecture}/{kind}")
        return processor

    def checkpoint(self, name: str) -> Checkpoint:
        checkpoint: Checkpoint = self._get("checkpoints", name)
        return checkpoint

    def default_checkpoint(self) -> Checkpoint:
        """The checkpoint to run when none is named; ConfigError when there is none or more than one."""
        defaults = [checkpoint for checkpoint in self.checkpoints.values() if checkpoint.default]
        if len(defaults) == 1:
            return defaults[0]
        if defaults:
            names = ", ".join(checkpoint.name for checkpoint in defaults)
            raise ConfigError(f"there are {len(defaults)} default checkpoints ({names}): choose one with --model")
        shipping = [name for name, offers in self._index.items() if "checkpoints" in offers]
        hint = f", or `pip install {shipping[0]}`, which brings one" if shipping else ""
        raise ConfigError(f"no installed plugin ships a default checkpoint: name a folder with --model{hint}")

    def checkpoint_folder(self, checkpoint: Checkpoint) -> Path:
        """Where a shipped checkpoint lies; PluginError when its files are gone."""
        package, _, relative = checkpoint.folder.partition(":")
        spec = find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec is not None else ():
            folder = Path(location, relative)
            if folder.is_dir():
                return folder
        owner = self.owner("checkpoints", checkpoint.name)
        mend = f"`pip install --force-reinstall {owner.distribution}`"
        raise PluginError(
            f"checkpoint {checkpoint.name!r} of plugin {owner.name!r} has lost {checkpoint.folder}: {mend}"
        )

    def resolve_model(self, text: str) -> Path:
        """The folder that a user means: a path, or else the name of a shipped checkpoint; nothing is downloaded."""
        path = Path(text).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{text} is a file: name the folder that holds it and its config.json")
        if text in self.checkpoints:
            return self.checkpoint_folder(self.checkpoints[text])
        if self._remedy("checkpoints", text) or get_close_matches(text, self.checkpoints, n=1):
            raise self._error("checkpoints", text)
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        if near := get_close_matches(path.name, siblings, n=1):
            raise CheckpointError(f"there is no folder {text!r}: did you mean {str(path.parent / near[0])!r}?")
        if path.name != text:
            raise CheckpointError(f"there is no folder {text!r}: nothing is downloaded, name one that exists")
        raise self._error("checkpoints", text)

    def kernel_table(self, overrides: Mapping[str, str] | None = None) -> KernelTable:
        """A fresh table over all ops and kernels. overrides: op name to provider name."""
        return KernelTable(self.ops.values(), self.kernels.values(), overrides)

    def add_commands(self, subparsers: argparse._SubParsersAction[Any]) -> tuple[str, ...]:
        """Let the plugins add their commands; returns a sentence for each plugin that could not."""
        return self._host.add_commands(subparsers)

    def add_routes(self, app: fastapi.FastAPI, engine: object, plugins: Iterable[str]) -> None:
        """Let the named plugins add their HTTP routes; PluginError when one has none or fails."""
        self._host.add_routes(app, engine, plugins)

    def _table(self, hook: str) -> Mapping[str, Any]:
        return MappingProxyType({key: claim.spec for key, claim in self._host.claims[hook].items()})

    def _get(self, hook: str, key: str) -> Any:
        claim = self._host.claims[hook].get(key)
        if claim is None:
            raise self._error(hook, key)
        return claim.spec

    def _error(self, hook: str, key: str) -> PlexorError:
        """PluginError when a plugin is what is missing, ConfigError when nobody knows the name."""
        known = self._remedy(hook, key) is not None
        return (PluginError if known else ConfigError)(self._missing(hook, key))

    def _missing(self, hook: str, key: str) -> str:
        """The sentence for a key that is not in the catalog."""
        remedy = self._remedy(hook, key)
        if remedy is not None:
            return f"no loaded plugin brings the {_CALLED[hook]} {key!r}: {remedy}"
        return f"no plugin that is known brings the {_CALLED[hook]} {key!r}{self._guess(hook, key)}"

    def _remedy(self, hook: str, key: str) -> str | None:
        """What brings a key that some plugin is known to offer; None when none is."""
        distributions = offering(self._index, hook, key)
        for report in self.reports:
            if report.state == "loaded":
                continue
            if report.distribution in distributions or key in report.offers.get(hook, ()):
                return (
                    f"plugin {report.name!r} ({report.distribution}) would, but it is {report.state} ({report.reason})"
                )
        installed = {report.distribution for report in self.reports}
        for distribution in distributions:
            upgrade = "--upgrade " if distribution in installed else ""
            return f"it comes with `pip install {upgrade}{distribution}`"
        return None

    def _guess(self, hook: str, key: str) -> str:
        """What the user may have meant by a key that nobody is known to offer."""
        here = self._host.claims[hook]
        elsewhere = [known for known in known_keys(self._index, hook) if known not in here]
        near = get_close_matches(key, [*here, *elsewhere], n=1)
        if near and near[0] in elsewhere:
            return f": did you mean {near[0]!r}? {self._remedy(hook, near[0])}"
        broken = [repr(report.name) for report in self.reports if report.state == "broken" and not report.offers]
        unsure = f" (though the broken {', '.join(broken)} may: see `plexor plugins`)" if broken else ""
        return f"{unsure}: {suggest(key, here, 'none is installed')}"
