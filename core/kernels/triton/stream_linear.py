"""Products of at most four rows at the speed of the memory: weights stream through registers, once.

A program owns a few rows of the weight, which lies as in a checkpoint, and takes them a tile at a time:

    weight rows      tile 0        tile 1        tile 2
    r             [ ........ ]  [ ........ ]  [ ........ ]     two tiles are on their way, and the one after
    r + 1         [ ........ ]  [ ........ ]  [ ........ ]     is asked for when the first has been added

The first two are asked for before the program waits for the kernel that makes x (see pdl.py), so the memory is never
idle between products. Sums are float32. A norm of x needs no pass of its own, because its scale leaves the sum:

    sum_k w[k] * g[k] * x[k] * rsqrt(mean(x^2) + eps)  =  rsqrt(mean(x^2) + eps) * sum_k w[k] * g[k] * x[k]

Numbers are loaded as pairs in 32 bits, which take one instruction each to widen; singly they would be unpacked as soon
as they arrive, before the program goes on. The kernels of the ops add what they do with the sums; their files are named
as the ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from plexor.kernels.triton.pdl import overlaps

MAX_ROWS = 4
"""Rows of x: with more, the multiplications take longer than the weights need to come."""

WARP_INPUTS = 256
"""Features of a row that a warp loads at once."""

# Pairs that a thread loads at once, 16 bytes.
LANE = tl.constexpr(4)
ALIGNMENT = 16


@triton.jit
def as_pairs(pointer):
    """A pointer to numbers of two bytes as one to pairs of them."""
    return pointer.to(tl.pointer_type(tl.int32))


@triton.jit
def lower(pair, DTYPE: tl.constexpr):
    """The number in the lower half of each pair, float32."""
    if tl.bfloat16 == DTYPE:
        return (pair << 16).to(tl.float32, bitcast=True)
    else:
        return pair.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def upper(pair, DTYPE: tl.constexpr):
    """The number in the upper half of each pair, float32."""
    if tl.bfloat16 == DTYPE:
        return (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def load_tile(weight, weight_stride, output, start, NUM_PAIRS: tl.constexpr, PAIRS: tl.constexpr):
    """Pairs from start of the weight's rows `output` [OUTPUTS] -> [OUTPUTS, PAIRS]."""
    place = start + tl.arange(0, PAIRS)[None, :]
    source = as_pairs(weight) + output.to(tl.int64)[:, None] * (weight_stride // 2) + place
    if NUM_PAIRS % PAIRS == 0:
        return tl.load(source, eviction_policy="evict_first")
    else:
        return tl.load(source, mask=place < NUM_PAIRS, other=0, eviction_policy="evict_first")


@triton.jit
def first_tiles(weight, weight_stride, output, NUM_PAIRS: tl.constexpr, PAIRS: tl.constexpr):
    """The first two tiles of the rows; twice the first where there is one only."""
    tile = load_tile(weight, weight_stride, output, 0, NUM_PAIRS, PAIRS)
    if NUM_PAIRS > PAIRS:
        return tile, load_tile(weight, weight_stride, output, PAIRS, NUM_PAIRS, PAIRS)
    else:
        return tile, tile


@triton.jit
def load_features(source, start, NUM_PAIRS: tl.constexpr, PAIRS: tl.constexpr):
    """The same pairs of a vector, [1, PAIRS]."""
    place = start + tl.arange(0, PAIRS)[None, :]
    if NUM_PAIRS % PAIRS == 0:
        return tl.load(as_pairs(source) + place)
    else:
        return tl.load(as_pairs(source) + place, mask=place < NUM_PAIRS, other=0)


@triton.jit
def sum_lanes(value):
    """[A, PAIRS] -> [A, PAIRS / LANE]: what a thread loaded at once it adds up without an exchange."""
    return tl.sum(tl.reshape(value, (value.shape[0], value.shape[1] // LANE, LANE)), axis=2)


@triton.jit
def send_off(COMPILED: tl.constexpr):
    """Keep the loads above from sinking among the sums below, as the assembler has it to spare registers: threads of a
    warp meet, which costs nothing, and no load is moved across. The interpreter has no such instruction.
    """
    if COMPILED:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def add_tile(
    sums, squares, tile, x, x_stride, gain, start, ROWS: tl.constexpr, NUM_PAIRS: tl.constexpr, PAIRS: tl.constexpr
):
    """The sums with one more tile. sums: ROWS tensors [OUTPUTS, PAIRS / LANE]; squares: ROWS of [1, PAIRS / LANE]."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    if gain is not None:
        scale = load_features(gain, start, NUM_PAIRS, PAIRS)
    grown = sums[:0]
    grown_squares = squares[:0]
    for row in tl.static_range(ROWS):
        pair = load_features(x + row * x_stride, start, NUM_PAIRS, PAIRS)
        even = lower(pair, DTYPE)
        odd = upper(pair, DTYPE)
        square = squares[row]
        if gain is not None:
            square += sum_lanes(even * even + odd * odd)
            even *= lower(scale, DTYPE)
            odd *= upper(scale, DTYPE)
        grown_squares += (square,)
        grown += (sums[row] + sum_lanes(lower(tile, DTYPE) * even + upper(tile, DTYPE) * odd),)
    return grown, grown_squares


@triton.jit
def side_by_side(parts, ROWS: tl.constexpr):
    """ROWS tensors [A, B] as one [A, B, 1, 2 or 4]; the fourth of three is zeros."""
    if ROWS == 1:
        return parts[0][:, :, None]
    elif ROWS == 2:
        return tl.join(parts[0], parts[1])
    else:
        last = tl.zeros_like(parts[0])
        if ROWS == 4:
            last = parts[3]
        pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], last))
        return tl.reshape(pairs, (parts[0].shape[0], parts[0].shape[1], 4))


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def products(
    tiles,
    weight,
    weight_stride,
    output,
    x,
    x_stride,
    gain,
    eps,
    ROWS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PAIRS: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """The rows of x, normed where there is a gain, times the weight's rows `output`, whose first two tiles are loaded:
    [OUTPUTS, ROWS rounded up to a power of two] float32.
    """
    tile, following = tiles
    sums = (tl.zeros((OUTPUTS, PAIRS // LANE), tl.float32),) * ROWS
    squares = (tl.zeros((1, PAIRS // LANE), tl.float32),) * ROWS
    LAST: tl.constexpr = (NUM_PAIRS - 1) // PAIRS * PAIRS
    for start in range(0, LAST - PAIRS, PAIRS):
        sums, squares = add_tile(sums, squares, tile, x, x_stride, gain, start, ROWS, NUM_PAIRS, PAIRS)
        tile = following
        following = load_tile(weight, weight_stride, output, start + 2 * PAIRS, NUM_PAIRS, PAIRS)
        send_off(COMPILED)
    if LAST > 0:
        sums, squares = add_tile(sums, squares, tile, x, x_stride, gain, LAST - PAIRS, ROWS, NUM_PAIRS, PAIRS)
        tile = following
    sums, squares = add_tile(sums, squares, tile, x, x_stride, gain, LAST, ROWS, NUM_PAIRS, PAIRS)
    total = side_by_side(sums, ROWS)
    if gain is None:
        return tl.sum(total, axis=1)
    else:
        # One reduction for both: threads meet as often for two as for one.
        square = tl.broadcast_to(side_by_side(squares, ROWS), total.shape)
        total, square = tl.reduce((total, square), 1, add_both)
        return total * tl.rsqrt(square / (2 * NUM_PAIRS) + eps)


@triton.jit
def in_pairs(value):
    """[2 * P, R], of which rows 2 p and 2 p + 1 belong together -> two of [P, R]."""
    pairs = tl.reshape(value, (value.shape[0] // 2, 2, value.shape[1]))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@dataclass(frozen=True, slots=True)
class Tile:
    """outputs: rows of the weight that a program owns, at least 2. inputs: features of them in a tile, at least 256 for
    each warp, because threads that hold the same numbers would have to exchange them. registers: most of a thread; None
    for as many as the assembler takes.
    """

    outputs: int
    inputs: int
    warps: int
    registers: int | None = None


def tile_for(num_inputs: int, num_rows: int) -> Tile:
    """A thread loads 16 bytes of each row of a tile. Two rows, four where they are long, or where x has several, whose
    numbers the weight's rows share.
    """
    is_long = num_inputs > 8192
    outputs = 4 if is_long or num_rows > 1 else 2
    inputs = min(1024, max(WARP_INPUTS, triton.next_power_of_2(num_inputs)))
    if num_inputs % 1024 and num_inputs % 512 == 0:
        inputs = 512
    return Tile(outputs, inputs, inputs // WARP_INPUTS, 64 if is_long and num_rows == 1 else None)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether there are rows, few enough, of numbers in two bytes that can be loaded 16 bytes at a time."""
    return 0 < x.shape[0] <= MAX_ROWS and x.dtype.itemsize == 2 and _is_aligned(x) and _is_aligned(weight)


def _is_aligned(rows: Tensor) -> bool:
    if rows.stride(1) != 1 or rows.data_ptr() % ALIGNMENT:
        return False
    return all(step * rows.element_size() % ALIGNMENT == 0 for step in (rows.stride(0), rows.shape[1]))


def options(x: Tensor, tile: Tile) -> dict[str, Any]:
    """What every kernel here is compiled for, and how it is launched."""
    pdl = overlaps(x.device)
    return {
        "ROWS": x.shape[0],
        "PADDED": triton.next_power_of_2(x.shape[0]),
        "NUM_PAIRS": x.shape[1] // 2,
        "OUTPUTS": tile.outputs,
        "PAIRS": tile.inputs // 2,
        "COMPILED": x.is_cuda,
        "PDL": pdl,
        "launch_pdl": pdl,
        "num_warps": tile.warps,
        "maxnreg": tile.registers,
    }
