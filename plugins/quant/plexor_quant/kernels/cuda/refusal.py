"""Why the kernels of coded weights cannot serve, told without importing what they need."""

from __future__ import annotations

from plexor.api import Facts, refuses_tiles

_OUTPUTS = 16
_INPUTS = 128
"""Features in the 128 bytes that the copy engine brings together, of one byte each."""

_GROUPS = (32, 64)
"""Sizes of groups that a warp's share of a row may hold several of; others are multiples of that share."""


def refuses_bytes(facts: Facts) -> str | None:
    """The reason against a product with weights of a byte each, or None."""
    return refuses_tiles(facts, _OUTPUTS, _INPUTS)


def refuses_nibbles(facts: Facts) -> str | None:
    """The reason against a product with weights of four bits each, or None."""
    size = facts.shape.get("group_size", _INPUTS)
    if size % _INPUTS and size not in _GROUPS and size != facts.shape.get("in_features"):
        return f"takes groups of 32, 64 or a multiple of 128 features, not of {size}"
    return refuses_tiles(facts, _OUTPUTS, 2 * _INPUTS)
