"""Products of many rows over four-bit weights on the tensor cores, which take the weights from registers.

The kernels, their pictures and their terms are in w4_linear.cu and w4_prepare.cu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plexor.api import LINEAR_HEADER, Norm, load_program, num_multiprocessors, tensor_map
from plexor_quant.kernels.cuda.coded import CodedCall, Codes
from plexor_quant.kernels.cuda.w4_layout import (
    PREPARE_THREADS,
    ROWS,
    STAGE_INPUTS,
    W4Cut,
    layout,
    lies_well,
    rounds,
    rule,
    share_rows,
    unit,
)

_THREADS = 384
_ONE_GROUP = 1 << 20
_LINEAR = (LINEAR_HEADER, Path(__file__).with_name("w4_linear.cu"))
_PREPARE = (LINEAR_HEADER, Path(__file__).with_name("w4_prepare.cu"))


class _Coded(ctypes.Structure):
    """As in w4_linear.cu."""

    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("sum_stride", ctypes.c_int),
        ("num_groups", ctypes.c_int),
        ("group_units", ctypes.c_int),
        ("share_rows", ctypes.c_int),
    )


class _Row(ctypes.Structure):
    """As in w4_prepare.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("num_inputs", ctypes.c_int),
        ("num_units", ctypes.c_int),
        ("sum_stride", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """x as the product reads it: reordered numbers [T, K], a scale for each row if they are e4m3, and sums of units."""

    x: Tensor
    scale: Tensor | None
    sums: Tensor | None


def prepare(x: Tensor, norm: Norm | None, e4m3: bool, sum_size: int | None, columns: int) -> Prepared:
    """Norm x [T, K] if wanted, round it to e4m3 if wanted, reorder it, and sum `sum_size` features each if wanted.

    columns: of a product's tile; rows of sums are padded to whole tiles.
    """
    num_rows, num_inputs = x.shape
    num_inputs_read = -(-num_inputs // STAGE_INPUTS) * STAGE_INPUTS
    threads = min(PREPARE_THREADS, num_inputs_read // 8)
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn if e4m3 else x.dtype, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device) if e4m3 else None
    row = _Row(x=x.data_ptr(), out=out.data_ptr(), x_stride=x.stride(0), num_inputs=num_inputs)
    sums = None
    if norm is not None:
        row.gain, row.eps = norm.gain.data_ptr(), norm.eps
    if scale is not None:
        row.scale = scale.data_ptr()
    if sum_size is not None:
        row.num_units, row.sum_stride = num_inputs_read // sum_size, -(-num_rows // columns) * columns
        sums = torch.empty(row.num_units, row.sum_stride, dtype=torch.float32, device=x.device)
        row.sums = sums.data_ptr()
    defines = {
        "THREADS": threads,
        "CHUNKS": -(-num_inputs_read // (8 * threads)),
        "NORM": norm is not None,
        "E4M3": e4m3,
        "UNIT": sum_size or 0,
        "HALF": x.dtype == torch.float16,
        "EPILOGUE": 0,
        "NARROW": 0,
    }
    load_program(_PREPARE, defines, threads, 0).launch(num_rows, (row,))
    return Prepared(out, scale, sums)


class W4Linear:
    """The product of one layer. The weight's tensor map is kept from call to call."""

    def __init__(self) -> None:
        self._weight_maps: dict[tuple[int, torch.Size, int], Any] = {}

    def __call__(self, coded: CodedCall) -> Tensor | None:
        """The call's y, on its way; None for one that these kernels do not take."""
        if not lies_well(coded):
            return None
        self.launch(coded, rule(coded))
        return coded.call.y

    def launch(self, coded: CodedCall, cut: W4Cut) -> None:
        """Queue the norm, the rounding and the product on the current stream."""
        sums = None if coded.codes.zero is None else unit(coded.codes)
        call = coded.call
        self.multiply(coded, prepare(call.x, call.norm, rounds(coded), sums, cut.columns), cut)

    def multiply(self, coded: CodedCall, prepared: Prepared, cut: W4Cut) -> None:
        """The product alone, of x that was prepared for this cut's columns."""
        x, weight, arguments, pair = prepared.x, coded.codes.weight, coded.call.arguments, coded.call.pair or ROWS
        (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
        stages, shared_bytes = layout(coded, cut)
        arguments.num_rows, arguments.num_inputs, arguments.num_outputs = num_rows, num_inputs, num_outputs
        arguments.pair, arguments.stages = pair, stages
        program = load_program(_LINEAR, _defines(coded, cut), _THREADS, shared_bytes, cluster=cut.split)
        box = 128 // x.element_size()
        x_map = tensor_map(x, (num_inputs, num_rows), (num_inputs,), (box, cut.columns))
        items = num_outputs // (2 * ROWS) * -(-num_rows // cut.columns)
        num_blocks = items * cut.split if cut.split > 1 else min(items, num_multiprocessors(x))
        parameters = (self._weight_map(weight, pair), x_map, arguments, _grid(coded.codes, prepared, pair))
        program.launch(num_blocks, parameters)

    def _weight_map(self, weight: Tensor, pair: int) -> Any:
        """Eight rows of the first group, eight of the second, and so on by turns."""
        key = (weight.data_ptr(), weight.shape, pair)
        if key not in self._weight_maps:
            num_outputs, num_bytes = weight.shape
            apart = share_rows(pair)
            sizes = (num_bytes, 8, 2, 4, (num_outputs - pair) // apart + (pair < apart))
            strides = (num_bytes, pair * num_bytes, 8 * num_bytes, apart * num_bytes)
            self._weight_maps[key] = tensor_map(weight, sizes, strides, (128, 8, 2, 4, 2))
        return self._weight_maps[key]


def _defines(coded: CodedCall, cut: W4Cut) -> Mapping[str, int]:
    return {
        "COLUMNS": cut.columns,
        "SPLIT": cut.split,
        "GROUP": unit(coded.codes),
        "E4M3": rounds(coded),
        "ZERO": coded.codes.zero is not None,
        "HALF": coded.call.x.dtype == torch.float16,
        "EPILOGUE": coded.call.epilogue,
        "NARROW": coded.call.narrow,
    }


def _grid(codes: Codes, prepared: Prepared, pair: int) -> _Coded:
    grid = _Coded(scale=codes.scale.data_ptr(), num_groups=codes.num_groups, share_rows=share_rows(pair))
    grid.group_units = _ONE_GROUP if codes.num_groups == 1 else codes.group_size // unit(codes)
    if prepared.scale is not None:
        grid.token_scale = prepared.scale.data_ptr()
    if codes.zero is not None and prepared.sums is not None:
        grid.zero, grid.sums, grid.sum_stride = codes.zero.data_ptr(), prepared.sums.data_ptr(), prepared.sums.stride(0)
    return grid
