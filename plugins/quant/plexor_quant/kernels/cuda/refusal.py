"""Why the kernels of coded weights cannot serve, told without importing what they need."""

from __future__ import annotations

from plexor.api import Facts, refuses_tiles

_OUTPUTS = 16
_INPUTS = 128
"""Features in the 128 bytes that the copy engine brings together, of one byte each."""


def refuses_bytes(facts: Facts) -> str | None:
    """The reason against a product with weights of a byte each, or None."""
    return refuses_tiles(facts, _OUTPUTS, _INPUTS)


def refuses_nibbles(facts: Facts) -> str | None:
    """The reason against a product with weights of four bits each, or None."""
    return refuses_tiles(facts, _OUTPUTS, 2 * _INPUTS)
