"""How products of many rows over four-bit weights are cut, what they take, and how their shared memory is laid out.

The terms are those of w4_linear.cu.
"""

from __future__ import annotations

from dataclasses import dataclass

from plexor.api import num_multiprocessors
from plexor_quant.kernels.cuda.coded import Activations, CodedCall, Codes

ROWS = 64
"""Half of the weight rows of a tile."""

_SHARE_ROWS = 32
STAGE_INPUTS = 256
_FEWEST_COLUMNS = 32
MOST_COLUMNS = 128
"""Of a tile: rows of x."""

PREPARE_THREADS = 512
_PREPARE_CHUNKS = 8
_LONGEST_UNIT = 128
_MOST_STAGES = 16
# Of the 227 KB that a block may have, its barriers take a part.
_SHARED_BYTES = 226 * 1024
_FEWEST_STAGED = 64


@dataclass(frozen=True, slots=True)
class W4Cut:
    """How a product is cut: see w4_linear.cu.

    columns: of a tile, a power of two. split: blocks that share a tile.
    """

    columns: int
    split: int = 1

    def fits(self, num_inputs: int) -> bool:
        """Whether every block of a cluster has something to do."""
        return -(-num_inputs // STAGE_INPUTS) >= self.split


def lies_well(coded: CodedCall) -> bool:
    """Whether the kernels can take a call that lies well in general: its sizes, and how the epilogue's operands lie."""
    call, codes = coded.call, coded.codes
    arguments = call.arguments
    gain = 0 if call.norm is None else call.norm.gain.data_ptr()
    addresses = (arguments.residual or 0, arguments.keys or 0, arguments.values or 0, call.y.data_ptr(), gain)
    strides = (arguments.residual_stride, arguments.entry_stride, arguments.y_stride)
    return (
        codes.is_packed
        and coded.activations is not Activations.INT8
        and takes(codes.weight.shape[0], codes.num_inputs, codes.group_size)
        and (call.pair == _SHARE_ROWS or (call.pair or ROWS) % ROWS == 0)
        and all(address % 16 == 0 for address in addresses)
        and all(stride % 8 == 0 for stride in strides)
    )


def unit(codes: Codes) -> int:
    """Inputs whose products are summed before they are scaled."""
    return _LONGEST_UNIT if codes.num_groups == 1 else min(codes.group_size, _LONGEST_UNIT)


def share_rows(pair: int) -> int:
    """Rows between the first ones of a tile's two warpgroups: pairs closer than half a tile lie in it two and two."""
    return ROWS if pair < ROWS else _SHARE_ROWS


def takes(num_outputs: int, num_inputs: int, group_size: int) -> bool:
    """Whether the kernels multiply weights of these sizes."""
    whole = group_size in (32, 64) or group_size % 128 == 0 or group_size >= num_inputs
    longest = 8 * PREPARE_THREADS * _PREPARE_CHUNKS
    return num_outputs % (2 * ROWS) == 0 and num_inputs % 32 == 0 and num_inputs <= longest and whole


def rule(coded: CodedCall) -> W4Cut:
    """How to cut a product: as was quickest on an H200 for a published model's layers (bench/NOTES.md).

    Blocks are made smaller while all of them still find a multiprocessor of their own: first narrower, where one tile
    holds all rows of x, then by sharing tiles.
    """
    num_rows, multiprocessors = coded.num_rows, num_multiprocessors(coded.call.x)
    columns = max(_FEWEST_COLUMNS, 1 << (min(num_rows, MOST_COLUMNS) - 1).bit_length())
    tiles = coded.codes.weight.shape[0] // (2 * ROWS) * -(-num_rows // columns)
    if num_rows <= columns == MOST_COLUMNS and 2 * tiles <= multiprocessors:
        columns, tiles = columns // 2, 2 * tiles
    if 2 * tiles > multiprocessors or not W4Cut(columns, 2).fits(coded.codes.num_inputs):
        return W4Cut(columns)
    narrower = columns > _FEWEST_COLUMNS and 4 * tiles <= multiprocessors
    return W4Cut(columns // 2 if narrower else columns, 2)


def rounds(coded: CodedCall) -> bool:
    """Whether x is rounded to e4m3, with a scale for each row."""
    return coded.activations is Activations.E4M3


def layout(coded: CodedCall, cut: W4Cut) -> tuple[int, int]:
    """Stages of the ring, and bytes of shared memory."""
    stage = ROWS * STAGE_INPUTS + cut.columns * STAGE_INPUTS * (1 if rounds(coded) else 2)
    if coded.codes.zero is not None:
        stage += -(-STAGE_INPUTS // unit(coded.codes) * cut.columns * 4 // 1024) * 1024
    staged = cut.split == 1 and cut.columns >= _FEWEST_STAGED
    rest = 256 * (cut.columns if coded.codes.zero is None else _FEWEST_STAGED) if staged else 0
    stages = min((_SHARED_BYTES - rest) // stage, _MOST_STAGES)
    return stages, stages * stage + rest
