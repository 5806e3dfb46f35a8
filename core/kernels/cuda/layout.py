"""How products are laid out in shared memory: how many stages a ring has, and what lies beside it."""

from __future__ import annotations

from dataclasses import dataclass

from plexor.kernels.cuda.call import BOX
from plexor.kernels.cuda.choice import Stream

STREAM_WARPS = 8
"""Of a block of stream_linear that multiply."""

_MOST_STAGES = 16
_MOST_STEPS = 64
# Of a multiprocessor's 228 KB: what is left lets the programs of an attention kernel start beside a product.
_STREAM_BYTES = 184 * 1024


@dataclass(frozen=True, slots=True)
class Variant:
    """How stream_linear is compiled for a product.

    columns: rows of x that fit. blocks: a tile has 16 * blocks weight rows. depth: k of a stage. resident: x and gains
    are copied once, not with each stage.
    """

    columns: int
    blocks: int
    depth: int
    resident: bool

    @property
    def boxes(self) -> int:
        """Boxes of 64 k in a stage."""
        return self.depth // BOX

    def x_rows(self, num_rows: int) -> int:
        """Rows of x that are copied: no more than there are, as powers of two, while x is resident."""
        return 1 << (num_rows - 1).bit_length() if self.resident else self.columns

    def layout(self, num_rows: int, num_inputs: int, norm: bool) -> tuple[int, int]:
        """Stages of the ring, and bytes of shared memory."""
        x_bytes = self.x_rows(num_rows) * self.depth * 2
        gain_bytes = self.depth * 2 if norm else 0
        steps = -(-num_inputs // self.depth)
        stage = 32 * self.blocks * self.depth
        resident = 0
        if self.resident:
            resident = _kilobytes(steps * (x_bytes + gain_bytes))
        else:
            stage += x_bytes + _kilobytes(gain_bytes)
        sums = self.blocks * self.columns // 8 * 128
        sum_bytes = 4 * STREAM_WARPS * ((2 if sums <= 128 else 1) * sums + 2 * self.columns)
        # A block costs 1 KB of the multiprocessor's memory besides what it asks for, and its barriers another.
        room = _STREAM_BYTES - 2048 - sum_bytes - resident
        stages = min(room // stage, _MOST_STAGES)
        return stages, stages * stage + resident + sum_bytes


def _kilobytes(num_bytes: int) -> int:
    return -(-num_bytes // 1024) * 1024


def variant_for(cut: Stream, num_rows: int, num_inputs: int) -> Variant:
    """What a cut means for so many rows; one row is kept, if its stages are not too many."""
    resident = num_rows == 1 and num_inputs <= cut.depth * _MOST_STEPS
    return Variant(8 if num_rows <= 8 else 16, cut.blocks, cut.depth, resident)
