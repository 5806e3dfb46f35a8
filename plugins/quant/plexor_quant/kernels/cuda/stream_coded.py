"""Products of at most 16 rows with coded weights at the speed of the memory, whose codes are read once.

The kernel, its picture and its terms are in stream_coded.cu. Activations are not rounded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import product as every
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plexor.api import LINEAR_HEADER, STREAM_HEADER, load_program, num_multiprocessors, tensor_map
from plexor_quant.kernels.cuda.coded import CodedCall
from plexor_quant.kernels.cuda.layout import (
    HALF,
    INT4,
    MOST,
    WHOLE,
    Cut,
    Layout,
    code_of,
    columns,
    depth,
    group_of,
    layout,
    x_rows,
)

X_BOX = 64
"""Activations in the 128 bytes that the copy engine swizzles together."""

LEAST_OUTPUTS, MOST_INPUTS = 4096, 8192
"""Of a four-bit weight, for tiles of 64 rows."""

_CODE_BOX = 128
_SOURCES = (LINEAR_HEADER, STREAM_HEADER, Path(__file__).with_name("stream_coded.cu"))


class CodeArguments(ctypes.Structure):
    """What the kernel is given of the codes besides their tensor map: struct Codes of its source."""

    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("groups", ctypes.c_int),
        ("buffers", ctypes.c_int),
    )


def rule(coded: CodedCall) -> Cut | None:
    """The cut that was quickest in a decoder's layers on an H200, of those that a product can have: bench/NOTES.md."""
    if coded.num_rows > 1:
        wanted = (Cut(2, 1, WHOLE), Cut(2, 1, WHOLE, False), Cut(1, 1, WHOLE), Cut(1, 1, WHOLE, False))
    elif code_of(coded.codes.weight) != INT4:
        wanted = (Cut(2, 1, MOST, True, 16), Cut(2, 1, MOST), Cut(1, 1, MOST), Cut(1, 1, WHOLE, False))
    else:
        # Tiles of 64 rows need many rows to be shared out, and few inputs and scales to be kept beside them.
        outputs, inputs = coded.codes.weight.shape[0], coded.codes.num_inputs
        is_wide = outputs >= LEAST_OUTPUTS and inputs <= MOST_INPUTS and group_of(coded.codes) not in (32, 64)
        wanted = (Cut(4 if is_wide else 2), Cut(2), Cut(1), Cut(1, 1, WHOLE, False))
    return next((cut for cut in wanted if layout(coded, cut) is not None), None)


def possible(coded: CodedCall) -> Iterator[Cut]:
    """Every cut of a product that can be."""
    for blocks, slices, room, resident, warps in every((1, 2, 4), (1, 2), (HALF, MOST, WHOLE), (True, False), (8, 16)):
        cut = Cut(blocks, slices, room, resident, warps)
        if layout(coded, cut) is not None and not (room == HALF and warps == 16):  # which have too few registers
            yield cut


class StreamCoded:
    """The product of one layer. The cut of each size and the weight's tensor maps are kept from call to call."""

    def __init__(self, choose: Callable[[CodedCall], Cut | None] = rule) -> None:
        self._choose = choose
        self._cuts: dict[tuple[int | None, ...], Cut | None] = {}
        self._maps: dict[tuple[int, torch.Size, Cut, int], Any] = {}

    def __call__(self, coded: CodedCall) -> Tensor | None:
        """The call's y, on its way; None where no cut can be."""
        size = (coded.num_rows, *coded.codes.weight.shape, coded.codes.group_size, coded.call.pair)
        if size not in self._cuts:
            self._cuts[size] = self._choose(coded)
        cut = self._cuts[size]
        made = None if cut is None else layout(coded, cut)
        if cut is None or made is None:
            return None
        self._launch(coded, cut, made)
        return coded.call.y

    def _launch(self, coded: CodedCall, cut: Cut, made: Layout) -> None:
        """Queue it on the current stream."""
        call, codes = coded.call, coded.codes
        x, norm, arguments = call.x, call.norm, call.arguments
        num_rows, num_inputs, num_outputs = coded.num_rows, codes.num_inputs, codes.weight.shape[0]
        pair = call.pair or 8 * cut.blocks
        arguments.num_rows, arguments.num_inputs, arguments.num_outputs = num_rows, num_inputs, num_outputs
        arguments.pair, arguments.stages, arguments.eps = pair, made.stages, 0.0 if norm is None else norm.eps
        taken, copied = depth(codes, cut), x_rows(num_rows, cut)
        defines = {
            "WARPS": cut.warps,
            "CODE": code_of(codes.weight),
            "GROUP": group_of(codes),
            "ZEROS": codes.zero is not None,
            "COLUMNS": columns(num_rows),
            "BLOCKS": cut.blocks,
            "DEPTH": taken,
            "RESIDENT": cut.resident,
            "X_ROWS": copied,
            "HALF": x.dtype == torch.float16,
            "NORM": norm is not None,
            "EPILOGUE": call.epilogue,
            "NARROW": call.narrow,
            "PER_SM": 2 if cut.room == HALF else 1,
        }
        program = load_program(_SOURCES, defines, (cut.warps + 2) * 32, made.num_bytes)
        boxes, box_count = num_inputs // X_BOX, taken // X_BOX
        x_map = tensor_map(x, (X_BOX, num_rows, boxes), (x.stride(0), X_BOX), (X_BOX, copied, box_count))
        gain_map = x_map if norm is None else tensor_map(norm.gain, (X_BOX, boxes), (X_BOX,), (X_BOX, box_count))
        weight_map = self._weight_map(codes.weight, cut, pair, taken)
        extra = CodeArguments(
            scale=codes.scale.data_ptr(),
            zero=None if codes.zero is None else codes.zero.data_ptr(),
            x=x.data_ptr(),
            gain=None if norm is None else norm.gain.data_ptr(),
            x_stride=x.stride(0),
            groups=codes.num_groups,
            buffers=made.buffers,
        )
        num_blocks = min(num_outputs // (16 * cut.blocks), num_multiprocessors(x))
        program.launch(num_blocks, (weight_map, x_map, gain_map, arguments, extra))

    def _weight_map(self, weight: Tensor, cut: Cut, pair: int, taken: int) -> Any:
        key = (weight.data_ptr(), weight.shape, cut, pair)
        if key not in self._maps:
            num_outputs, num_bytes = weight.shape
            box_count = taken // (2 if weight.dtype == torch.uint8 else 1) // _CODE_BOX
            sizes = (_CODE_BOX, num_outputs - pair, num_bytes // _CODE_BOX, 2)
            strides = (num_bytes, _CODE_BOX, pair * num_bytes)
            self._maps[key] = tensor_map(weight, sizes, strides, (_CODE_BOX, 8 * cut.blocks, box_count, 2))
        return self._maps[key]
