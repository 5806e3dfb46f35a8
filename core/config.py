"""What a run is told: the environment, read here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from plexor.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment variables that Plexor knows.

    plugins: `PLEXOR_PLUGINS=a,b` loads only these plugins, an empty value loads none; None (unset) loads all.
    debug: `PLEXOR_DEBUG=1` shows tracebacks, as `--debug` does.
    """

    plugins: frozenset[str] | None = None
    debug: bool = False

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Environment:
        """From the process' environment; ConfigError when a value makes no sense."""
        listed = variables.get("PLEXOR_PLUGINS")
        debug = variables.get("PLEXOR_DEBUG", "0")
        if debug not in ("", "0", "1"):
            raise ConfigError(f"PLEXOR_DEBUG is {debug!r}: set it to 1 for tracebacks, or to 0")
        names = None if listed is None else frozenset(name.strip() for name in listed.split(",") if name.strip())
        return cls(plugins=names, debug=debug == "1")
