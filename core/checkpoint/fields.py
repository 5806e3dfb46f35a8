"""Typed reading of `config.json`: a wrong or missing field is named, with what was found and what is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plexor.errors import CheckpointError


class Fields:
    """A raw config; each reader returns the field, its default if it is absent or null, or raises CheckpointError."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self.raw = raw
        self._where = where

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(name, value, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None, *, above: float | None = None) -> float:
        """A finite number, greater than `above` where that is given."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(name, value, "a number")
        if above is not None and value <= above:
            raise self._wrong(name, value, f"greater than {above:g}")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def section(self, name: str) -> Fields:
        """A nested object, such as `text_config`."""
        value = self._value(name, None)
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object")
        return Fields(value, f"{name} of {self._where}")

    def _value(self, name: str, default: object) -> Any:
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self._where} has no {name!r}, which this architecture needs: complete the file")
        return value

    def _wrong(self, name: str, value: object, need: str) -> CheckpointError:
        return CheckpointError(f"{self._where} has {name} = {value!r}, which must be {need}: correct the file")
