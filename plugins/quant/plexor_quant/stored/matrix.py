"""A weight stored as one e4m3 or int8 number for each element, with scales for blocks of it."""

from __future__ import annotations

from dataclasses import dataclass

from plexor.api import TensorSource
from plexor_quant.stored.scheme import Scheme
from plexor_quant.stored.source import Blocks, Codes, span


@dataclass(frozen=True, slots=True)
class Matrix:
    """A Layer of a stored tensor [out, in]; zero_point: None where it is zero everywhere."""

    source: TensorSource
    name: str
    shape: tuple[int, int]
    scheme: Scheme
    scale: Blocks
    zero_point: Blocks | None = None

    def codes(self, rows: range, columns: range) -> Codes:
        numbers = self.source.read(self.name, (span(rows), span(columns)))
        zero_point = None if self.zero_point is None else self.zero_point.read(rows, columns).int()
        size = self.scale.block[1]
        return Codes(numbers, self.scale.scale(rows, columns), zero_point, size, columns.start % size)
