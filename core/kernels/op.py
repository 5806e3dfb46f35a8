"""Sample: one set of arguments on which every provider of an op is held to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """Positional arguments of one call, named for the test report.

    name: what is odd about it ("no tokens", "ties"). args: passed in order; tensors in them are cloned for each
    provider, so an op may write into its arguments. written: positions in args of tensors (or mappings of tensors)
    that the op writes and that are compared as well as the result. spent: positions of tensors that the op's caller
    gives up, so that a provider may keep its result there. shape: the `Facts.shape` a model would state.
    """

    name: str
    args: tuple[Any, ...]
    written: tuple[int, ...] = ()
    spent: tuple[int, ...] = ()
    shape: tuple[tuple[str, int], ...] = ()
    kv_dtype: str | None = None
