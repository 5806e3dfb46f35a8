"""From what one hook implementation returns to checked claims: one spec each, under its key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pluggy

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

KEYS: Mapping[str, tuple[type, tuple[str, ...]]] = MappingProxyType(
    {
        "architectures": (Architecture, ("name",)),
        "layers": (Layer, ("slot", "name")),
        "ops": (Op, ("name",)),
        "kernels": (Kernel, ("op", "provider")),
        "precisions": (Precision, ("name",)),
        "kv_formats": (KVFormat, ("name",)),
        "checkpoint_formats": (CheckpointFormat, ("name",)),
        "stored_weights": (StoredWeights, ("name",)),
        "input_processors": (InputProcessor, ("architecture", "kind")),
        "checkpoints": (Checkpoint, ("name",)),
        "observers": (Observer, ("name",)),
    }
)
"""The hooks that return data: what they return, and the fields that make its key, joined by "/"."""

_FIELD_TYPES: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "str": (str, "a string"),
        "Target": (str, "'package.module:attribute'"),
        "Target | None": (str, "'package.module:attribute'"),
        "int": (int, "a whole number"),
        "bool": (bool, "True or False"),
        "tuple[str, ...]": (tuple, "a tuple of strings"),
        "tuple[int, int] | None": (tuple, "two whole numbers such as (9, 0)"),
        "frozenset[str]": (frozenset, "a frozenset of strings"),
        "Mapping[str, Tolerance]": (Mapping, "tolerances by dtype name"),
    }
)
"""What an annotated field must hold; Python does not enforce annotations when a plugin makes a spec."""


class BrokenError(Exception):
    """Why a plugin is not taken, as one sentence, with what it had claimed by then; never leaves the host."""

    def __init__(self, reason: str, claims: tuple[Claim, ...] = ()) -> None:
        super().__init__(reason)
        self.claims = claims


@dataclass(frozen=True, slots=True)
class Claim:
    """One spec under its key, and the name of the plugin that brought it."""

    hook: str
    key: str
    spec: Any
    plugin: str


def claims_of(hook: str, plugin: str, implementation: pluggy.HookImpl) -> tuple[Claim, ...]:
    """Call one implementation of a data hook; BrokenError when it fails or returns anything but sound specs."""
    spec_type, key_fields = KEYS[hook]
    try:
        returned: Any = implementation.function()
        specs = tuple(returned)
    except (Exception, SystemExit) as error:
        raise BrokenError(f"its hook {hook!r} failed ({said(error)})") from error
    claims = []
    for spec in specs:
        if type(spec) is not spec_type:
            raise BrokenError(f"its hook {hook!r} returned {spec!r} among its specs, where {spec_type.__name__} is due")
        problem = _problem(spec)
        if problem:
            raise BrokenError(f"its hook {hook!r} returned {spec_type.__name__} with {problem}")
        key = "/".join(getattr(spec, name) for name in key_fields)
        claims.append(Claim(hook, key, spec, plugin))
    return tuple(claims)


def offers_of(claims: Iterable[Claim]) -> dict[str, tuple[str, ...]]:
    """The keys of claims by hook."""
    offers: dict[str, tuple[str, ...]] = {}
    for claim in claims:
        offers[claim.hook] = (*offers.get(claim.hook, ()), claim.key)
    return offers


def said(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _problem(spec: Any) -> str:
    for item in dataclasses.fields(spec):
        value = getattr(spec, item.name)
        if item.default is not dataclasses.MISSING and value == item.default:
            continue
        required, due = _FIELD_TYPES.get(str(item.type), (object, ""))
        if not isinstance(value, required) or value == "":
            return f"{item.name}={value!r}, where {due} is due"
        if str(item.type).startswith("Target") and not all(str(value).partition(":")):
            return f"{item.name}={value!r}, where {due} is due"
        if item.name == "needs" and isinstance(value, tuple) and (bad := _bad_needs(value)):
            return f"{bad[0]!r} among its needs, where 'hook:key' is due, such as 'layers:slot/name'"
    return ""


def _bad_needs(needs: tuple[object, ...]) -> list[object]:
    return [need for need in needs if not isinstance(need, str) or not is_need(need)]


def is_need(need: str) -> bool:
    """Whether a string has the form "hook:key" with a hook that returns data."""
    hook, _, key = need.partition(":")
    return hook in KEYS and bool(key)
