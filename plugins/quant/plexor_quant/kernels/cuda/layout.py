"""How stream_coded is cut for a product, and how its shared memory is laid out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plexor_quant.kernels.cuda.coded import CodedCall, Codes

E4M3, INT8, INT4 = range(3)
WARPS = 8
"""Of a block of threads that multiply."""

_MOST_STAGES = 16
_MOST_STEPS = 64
_MOST_BUFFERS = 16
_SLICE = {E4M3: 64, INT8: 64, INT4: 128}
# Of a multiprocessor's 228 KB, by how many blocks of threads share it: one leaves room for the programs of an attention
# kernel that start beside it. A block costs 1 KB besides what it asks for, and its barriers another.
_BYTES = {1: 182 * 1024, 2: 112 * 1024, 3: 74 * 1024}


@dataclass(frozen=True, slots=True)
class Cut:
    """A way to multiply.

    blocks: a tile has 16 * blocks weight rows. slices: of a stage for each warp. per_sm: blocks of threads that share a
    multiprocessor. resident: x is copied once, not with each stage.
    """

    blocks: int
    slices: int = 1
    per_sm: int = 1
    resident: bool = True


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
    return _SLICE[code_of(codes.weight)] * WARPS * cut.slices


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
    if codes.weight.shape[0] % (2 * rows) or pair % rows or sums > 512 or not _groups_fit(codes, rows):
        return None
    stage = 2 * rows * taken // (2 if codes.is_packed else 1)
    x_bytes = (x_rows(num_rows, cut) + (coded.call.norm is not None)) * taken * 2
    sum_bytes = 4 * WARPS * ((2 if sums <= 128 else 1) * (sums + columns(num_rows)))
    scale_bytes = 2 * rows * codes.num_groups * (2 if codes.zero is None else 3) if group_of(codes) else 0
    room = _BYTES[cut.per_sm] - sum_bytes
    if cut.resident:
        room -= steps * x_bytes
    else:
        stage += x_bytes
    # The ring runs ahead by all of its stages: scales of the tiles that these belong to are wanted with them.
    stages = min(room // stage, _MOST_STAGES)
    buffers = 0
    while scale_bytes and stages > 0:
        buffers = min(-(-stages // steps) + 1, _MOST_BUFFERS)
        if stages * stage + buffers * scale_bytes <= room:
            break
        stages -= 1
    if stages < 2 or (cut.resident and steps > _MOST_STEPS):
        return None
    return Layout(stages, buffers, stages * stage + buffers * scale_bytes + _BYTES[cut.per_sm] - room)


def _groups_fit(codes: Codes, rows: int) -> bool:
    """Whether a slice lies in one group, or groups in one lane's part of a slice or in wholes of them."""
    group, size = group_of(codes), _SLICE[INT4]
    if not group:
        return True
    copied = rows * codes.num_groups * (2 if codes.zero is None else 1)
    return copied % 16 == 0 and (group % size == 0 or group in (size // 2, size // 4))
