"""Why the kernels of 2:4 weights cannot serve, told without importing what they need."""

from __future__ import annotations

from plexor.api import Facts, refuses_tiles


def refuses(facts: Facts) -> str | None:
    """The reason against a product of these sizes, or None."""
    return refuses_tiles(facts, 1, 64)
