"""How tiled_linear cuts a product into tiles, lays them out in shared memory, and which instruction multiplies them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from plexor.kernels.cuda.call import BOX

_MOST_STAGES = 16
# Of the 227 KB that a block may have, its barriers take a part.
_SHARED_BYTES = 226 * 1024
_MOST_TOKENS = 256
_MOST_NUMBERS = 256 * 128
"""Of a tile, kept in registers."""
_UNIT = 2048
"""Numbers of a tile that are added up by the same block: eight of each thread."""
_LEAST_STAGES = 4


@dataclass(frozen=True, slots=True)
class TiledCut:
    """How a product is cut. outputs: weight rows of a tile. split: parts of k that blocks of a cluster take.
    share: tiles whose blocks, in one cluster, fetch the same rows of x together.
    """

    outputs: int
    split: int = 1
    share: int = 1

    def fits(self, num_rows: int, num_outputs: int, num_boxes: int, pair: int | None) -> bool:
        """Whether a product can be cut so. num_boxes: of 128 bytes of k."""
        tokens = tokens_for(num_rows)
        return (
            num_outputs % 16 == self.outputs % (32 if tokens == 64 else 16) == (pair or 8) % 8 == 0
            and 32 <= self.outputs <= 256
            and self.outputs * tokens <= _MOST_NUMBERS
            and (pair is None or piece_rows(self.outputs, pair) >= 32)
            and num_boxes >= self.split
            and (self.split == 1 or num_rows <= _MOST_TOKENS)
            and tiled_layout(num_rows, self)[1] >= _LEAST_STAGES
        )


def tokens_for(num_rows: int) -> int:
    """Rows of x in a tile."""
    return next((tokens for tokens in (64, 128) if num_rows <= tokens), _MOST_TOKENS)


def tiled_layout(num_rows: int, cut: TiledCut) -> tuple[int, int, int]:
    """Rows of x in a tile, stages of the ring, bytes of shared memory: for it, and for sums that others send."""
    tokens = tokens_for(num_rows)
    stage = (tokens + cut.outputs) * BOX * 2
    units = tokens * cut.outputs // _UNIT
    exchanged = (cut.split - 1) * -(-units // cut.split) * _UNIT * 4
    stages = min((_SHARED_BYTES - exchanged) // stage, _MOST_STAGES)
    return tokens, stages, stages * stage + exchanged


@cache
def instruction(columns: int, dtype: torch.dtype) -> str:
    """The body of a macro of d, a, b and adds: adds to the sums d, or replaces them by, the product of 64 rows, which
    the descriptor a names, and of so many columns, which b names, over 32 bytes.
    """
    sizes_and_types, signs, register = {
        torch.bfloat16: ("k16.f32.bf16.bf16", ", 1, 1, 0, 0", "f"),
        torch.float16: ("k16.f32.f16.f16", ", 1, 1, 0, 0", "f"),
        torch.float8_e4m3fn: ("k32.f32.e4m3.e4m3", ", 1, 1", "f"),
        torch.int8: ("k32.s32.s8.s8", "", "r"),
    }[dtype]
    num_sums = columns // 2
    places = ", ".join(f"%{i}" for i in range(num_sums))
    sums = ", ".join(f'"+{register}"((d)[{i}])' for i in range(num_sums))
    return (
        f'asm volatile("{{\\n.reg .pred adds;\\nsetp.ne.b32 adds, %{num_sums + 2}, 0;\\n'
        f"wgmma.mma_async.sync.aligned.m64n{columns}{sizes_and_types} "
        f'{{{places}}}, %{num_sums}, %{num_sums + 1}, adds{signs};\\n}}" '
        f': {sums} : "l"(a), "l"(b), "r"((int)(adds)))'
    )


def piece_rows(outputs: int, pair: int) -> int:
    """Weight rows of one copy: rows that belong together lie at one distance within blocks of 2 * pair rows."""
    return 2 * math.gcd(outputs // 2, pair)


@cache
def tiled_cut_for(
    num_rows: int, num_outputs: int, num_boxes: int, pair: int | None, num_multiprocessors: int
) -> TiledCut | None:
    """The cut that a model of the GPU's limits expects to be quickest; None if none fits."""
    cuts = TILED_CUTS if num_rows <= _MOST_TOKENS else _LONG_CUTS
    fitting = [cut for cut in cuts if cut.fits(num_rows, num_outputs, num_boxes, pair)]
    return min(
        fitting, key=lambda cut: _clocks(cut, num_rows, num_outputs, num_boxes, num_multiprocessors), default=None
    )


TILED_CUTS = (
    *(TiledCut(outputs) for outputs in (32, 64, 112, 128, 224, 256)),
    *(TiledCut(outputs, split=2) for outputs in (32, 64, 96)),
)
"""What decode steps are cut by: on an H200 more parts of k were slower, and blocks that shared x no quicker."""

_LONG_CUTS = (TiledCut(128, share=2), TiledCut(64), TiledCut(32))
# Bytes in a clock, of all multiprocessors but for the first: what one takes in, what the L2 gives, what memory gives.
_INTO_ONE, _FROM_L2, _FROM_MEMORY = 48, 5500, 2600
_LEAST = 400
"""Clocks of a stage, however small."""
_BEGIN_AND_END = 3000
"""Clocks of a tile, besides its stages."""
_JOINT = 1500
"""Clocks for sums that are added up over a cluster."""


def _clocks(cut: TiledCut, num_rows: int, num_outputs: int, num_boxes: int, num_multiprocessors: int) -> float:
    tokens = tokens_for(num_rows)
    num_blocks = -(-num_outputs // cut.outputs) * -(-num_rows // tokens) * cut.split
    rounds = -(-num_blocks // (num_multiprocessors // (cut.split * cut.share) * cut.split * cut.share))
    at_once = num_blocks / rounds
    x_bytes, weight_bytes = min(num_rows, tokens) * 2 * BOX, cut.outputs * 2 * BOX
    stage = max(
        _LEAST,
        tokens * cut.outputs / 32,  # of the tensor cores
        (x_bytes + weight_bytes) / _INTO_ONE,
        (x_bytes / cut.share + weight_bytes) * at_once / _FROM_L2,
        weight_bytes * at_once / _FROM_MEMORY if num_rows <= tokens else 0.0,
    )
    return rounds * (num_boxes / cut.split * stage + _BEGIN_AND_END) + (_JOINT if cut.split > 1 else 0)
