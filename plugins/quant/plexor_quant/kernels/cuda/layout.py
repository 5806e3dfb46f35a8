"""How stream_coded is cut for a product, and how its shared memory is laid out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plexor_quant.kernels.cuda.coded import CodedCall, Codes

E4M3, INT8, INT4 = range(3)
_MOST_STAGES = 16
_MOST_BUFFERS = 16
_SLICE = {E4M3: 64, INT8: 64, INT4: 128}
# Of a multiprocessor's 228 KB. A block costs 1 KB besides what it asks for, and its barriers another.
WHOLE, MOST, HALF = 225, 182, 111
"""KB that a block of threads may have: nearly all; what leaves room for the programs of an attention kernel that start
beside it; what leaves room for a block of the next product.

Products behind a norm and others take turns in a decoder. In HALF those behind a norm get _MORE, too much for two of
them: no multiprocessor is given two blocks of one kernel while others have none, and each finds one of the other kind's
place free.
"""

_MORE = 113


@dataclass(frozen=True, slots=True)
class Cut:
    """A way to multiply.

    blocks: a tile has 16 * blocks weight rows. slices: of a stage for each warp. room: KB of shared memory. resident: x
    is brought once, not with each stage. warps: that multiply.
    """

    blocks: int
    slices: int = 1
    room: int = MOST
    resident: bool = True
    warps: int = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """What a launch needs to know of shared memory: stages of the ring, buffers of scales, bytes of all."""

    stages: int
    buffers: int
    num_bytes: int


def code_of(weight: Tensor) -> int:
    """How the kernel's source numbers what a weight's codes are."""
    return {torch.float8_e4m3fn: E4M3, torch.int8: INT8, torch.uint8: INT4}[weight.dtype]


def depth(codes: Codes, cut: Cut) -> int:
    """Inputs of a stage."""
    return _SLICE[code_of(codes.weight)] * cut.warps * cut.slices


def group_of(codes: Codes) -> int:
    """Features that share a scale, 0 where all of a row's do."""
    return 0 if codes.num_groups == 1 else codes.group_size


def columns(num_rows: int) -> int:
    """Rows of x that the tensor cores see."""
    return 8 if num_rows <= 8 else 16


def x_rows(num_rows: int, cut: Cut) -> int:
    """Rows of x that are copied: no more than there are, as powers of two, while x is resident."""
    return 1 << (num_rows - 1).bit_length() if cut.resident else columns(num_rows)


def layout(coded: CodedCall, cut: Cut) -> Layout | None:
    """None where a cut cannot be."""
    codes, num_rows = coded.codes, coded.num_rows
    rows, num_inputs = 8 * cut.blocks, codes.num_inputs
    taken, steps = depth(codes, cut), -(-num_inputs // depth(codes, cut))
    sums = cut.blocks * columns(num_rows) // 8 * 128
    pair = coded.call.pair or rows
    if codes.weight.shape[0] % (2 * rows) or pair % rows or sums > 64 * cut.warps or not _groups_fit(codes, rows):
        return None
    stage = 2 * rows * taken // (2 if codes.is_packed else 1)
    is_normed = coded.call.norm is not None
    x_bytes = x_rows(num_rows, cut) * taken * 2
    sum_bytes = 4 * cut.warps * ((2 if sums <= 128 else 1) * (sums + columns(num_rows)))
    scale_bytes = 2 * rows * codes.num_groups * (2 if codes.zero is None else 3) if group_of(codes) else 0
    least = 1024 * (_MORE if cut.room == HALF and is_normed else 0)
    most = max(1024 * cut.room, least)
    room = most - sum_bytes
    if cut.resident:
        room -= steps * x_bytes
    else:
        stage += x_bytes + (taken * 2 if is_normed else 0)
    # The ring runs ahead by all of its stages: scales of the tiles that these belong to are wanted with them.
    stages = min(room // stage, _MOST_STAGES)
    buffers = 0
    while scale_bytes and stages > 0:
        buffers = min(-(-stages // steps) + 1, _MOST_BUFFERS)
        if stages * stage + buffers * scale_bytes <= room:
            break
        stages -= 1
    if stages < 2:
        return None
    return Layout(stages, buffers, max(stages * stage + buffers * scale_bytes + most - room, least))


def _groups_fit(codes: Codes, rows: int) -> bool:
    """Whether a slice lies in one group, or groups in one lane's part of a slice or in wholes of them."""
    group, size = group_of(codes), _SLICE[INT4]
    if not group:
        return True
    copied = rows * codes.num_groups * (2 if codes.zero is None else 1)
    return copied % 16 == 0 and (group % size == 0 or group in (size // 2, size // 4))
