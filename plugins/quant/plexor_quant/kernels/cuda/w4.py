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

from plexor.api import LINEAR_HEADER, Call, Norm, load_program, num_multiprocessors, tensor_map

ROWS = 64
"""Half of the weight rows of a tile."""

MOST_COLUMNS = 128
"""Of a tile: rows of x."""

_THREADS = 384
_STAGE_INPUTS = 256
_MOST_STAGES = 16
# Of the 227 KB that a block may have, its barriers take a part.
_SHARED_BYTES = 226 * 1024
_STAGED_BYTES = 16 * 1024
_ONE_GROUP = 1 << 20
_PREPARE_THREADS = 512
_LINEAR = (LINEAR_HEADER, Path(__file__).with_name("w4_linear.cu"))
_PREPARE = (LINEAR_HEADER, Path(__file__).with_name("w4_prepare.cu"))


@dataclass(frozen=True, slots=True)
class W4Cut:
    """How a product is cut: see w4_linear.cu.

    columns: of a tile. parts: of a tile's columns, multiplied one behind the other. split: blocks that share a tile.
    share: blocks that share x.
    """

    columns: int
    parts: int = 1
    split: int = 1
    share: int = 1

    def fits(self, num_outputs: int, num_inputs: int) -> bool:
        """Whether every block of every cluster has something to do."""
        return num_outputs // (2 * ROWS) % self.share == 0 and -(-num_inputs // _STAGE_INPUTS) >= self.split


@dataclass(frozen=True, slots=True)
class W4Call:
    """A call whose weight holds nibbles, uint8 [N, K / 2].

    scale: bfloat16 [N, groups]. zero: uint8 [N, groups], or None where nibble 8 means zero. group_size: inputs that
    share a scale. rounds: whether x is rounded to e4m3 with a scale for each row, or else taken as it is.
    """

    call: Call
    scale: Tensor
    zero: Tensor | None
    group_size: int
    rounds: bool

    @property
    def num_inputs(self) -> int:
        return self.call.x.shape[1]

    @property
    def num_outputs(self) -> int:
        return self.call.weight.shape[0]

    @property
    def unit(self) -> int:
        """Inputs whose products are summed before they are scaled."""
        return 128 if self.scale.shape[1] == 1 else min(self.group_size, 128)

    def lies_well(self) -> bool:
        """Whether the kernels can take the operands as they lie."""
        x, weight, scale = self.call.x, self.call.weight, self.scale
        return (
            x.dtype in (torch.bfloat16, torch.float16)
            and takes(self.num_outputs, self.num_inputs, self.group_size)
            and (self.call.pair or ROWS) % ROWS == 0
            and x.shape[0] > 0
            and x.stride(1) == 1
            and x.stride(0) % 8 == x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
            and weight.is_contiguous()
            and scale.is_contiguous()
            and (self.zero is None or self.zero.is_contiguous())
            and self._epilogue_lies_well()
        )

    def _epilogue_lies_well(self) -> bool:
        """Whether eight numbers at once can be read and stored; tables and slots are torch's own and always lie so."""
        arguments = self.call.arguments
        addresses = (arguments.residual or 0, arguments.keys or 0, arguments.values or 0, self.call.y.data_ptr())
        strides = (arguments.residual_stride, arguments.entry_stride, arguments.y_stride)
        return all(address % 16 == 0 for address in addresses) and all(stride % 8 == 0 for stride in strides)


def takes(num_outputs: int, num_inputs: int, group_size: int) -> bool:
    """Whether the kernels multiply weights of these sizes."""
    whole = group_size in (32, 64) or group_size % 128 == 0 or group_size >= num_inputs
    longest = 8 * _PREPARE_THREADS * 8
    return num_outputs % (2 * ROWS) == 0 and num_inputs % 32 == 0 and num_inputs <= longest and whole


def rule(call: W4Call) -> W4Cut:
    """How to cut a product where nothing was measured."""
    num_rows = call.call.num_rows
    columns = max(32, 1 << (min(num_rows, MOST_COLUMNS) - 1).bit_length())
    tiles = call.num_outputs // (2 * ROWS) * -(-num_rows // columns)
    multiprocessors = num_multiprocessors(call.call.x)
    if tiles >= 2 * multiprocessors:
        shared = W4Cut(columns, share=2)
        return shared if shared.fits(call.num_outputs, call.num_inputs) else W4Cut(columns)
    for split in (4, 2):
        if tiles * split <= multiprocessors and W4Cut(columns, split=split).fits(call.num_outputs, call.num_inputs):
            return W4Cut(columns, split=split)
    return W4Cut(columns)


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


def prepare(x: Tensor, norm: Norm | None, rounds: bool, unit: int | None, columns: int) -> Prepared:
    """Norm x [T, K] if wanted, round it to e4m3 if wanted, reorder it, and sum `unit` features each if wanted.

    columns: of a product's tile; rows of sums are padded to whole tiles.
    """
    num_rows, num_inputs = x.shape
    num_inputs_read = -(-num_inputs // _STAGE_INPUTS) * _STAGE_INPUTS
    threads = min(_PREPARE_THREADS, num_inputs_read // 8)
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn if rounds else x.dtype, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device) if rounds else None
    row = _Row(x=x.data_ptr(), out=out.data_ptr(), x_stride=x.stride(0), num_inputs=num_inputs)
    sums = None
    if norm is not None:
        row.gain, row.eps = norm.gain.data_ptr(), norm.eps
    if scale is not None:
        row.scale = scale.data_ptr()
    if unit is not None:
        row.num_units, row.sum_stride = num_inputs_read // unit, -(-num_rows // columns) * columns
        sums = torch.empty(row.num_units, row.sum_stride, dtype=torch.float32, device=x.device)
        row.sums = sums.data_ptr()
    defines = {
        "THREADS": threads,
        "CHUNKS": -(-num_inputs_read // (8 * threads)),
        "NORM": norm is not None,
        "E4M3": rounds,
        "UNIT": unit or 0,
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

    def launch(self, call: W4Call, cut: W4Cut | None = None) -> None:
        """Queue the norm, the rounding and the product of a call that lies well on the current stream."""
        cut = cut or rule(call)
        unit = None if call.zero is None else call.unit
        self.multiply(call, prepare(call.call.x, call.call.norm, call.rounds, unit, cut.columns), cut)

    def multiply(self, call: W4Call, prepared: Prepared, cut: W4Cut) -> None:
        """The product alone, of x that was prepared for this cut's columns."""
        x, arguments, pair = prepared.x, call.call.arguments, call.call.pair or ROWS
        num_rows, num_inputs = x.shape
        stages, shared_bytes = _layout(call, cut)
        arguments.num_rows, arguments.num_inputs, arguments.num_outputs = num_rows, num_inputs, call.num_outputs
        arguments.pair, arguments.stages = pair, stages
        program = load_program(_LINEAR, _defines(call, cut), _THREADS, shared_bytes, cluster=cut.split * cut.share)
        box = 128 // x.element_size()
        x_map = tensor_map(x, (num_inputs, num_rows), (num_inputs,), (box, cut.columns // cut.share))
        items = call.num_outputs // (2 * ROWS) // cut.share * -(-num_rows // cut.columns)
        clusters = items if cut.split > 1 else min(items, num_multiprocessors(x) // cut.share)
        program.launch(
            clusters * cut.split * cut.share,
            (self._weight_map(call.call.weight, pair), x_map, arguments, _coded(call, prepared)),
        )

    def _weight_map(self, weight: Tensor, pair: int) -> Any:
        """Eight rows of the first group, eight of the second, and so on by turns."""
        key = (weight.data_ptr(), weight.shape, pair)
        if key not in self._weight_maps:
            num_outputs, num_bytes = weight.shape
            sizes = (num_bytes, 8, 2, (num_outputs - pair) // 8)
            strides = (num_bytes, pair * num_bytes, 8 * num_bytes)
            self._weight_maps[key] = tensor_map(weight, sizes, strides, (128, 8, 2, 8))
        return self._weight_maps[key]


def _defines(call: W4Call, cut: W4Cut) -> Mapping[str, int]:
    return {
        "COLUMNS": cut.columns,
        "PARTS": cut.parts,
        "SPLIT": cut.split,
        "SHARE": cut.share,
        "GROUP": call.unit,
        "E4M3": call.rounds,
        "ZERO": call.zero is not None,
        "HALF": call.call.x.dtype == torch.float16,
        "EPILOGUE": call.call.epilogue,
        "NARROW": call.call.narrow,
    }


def _coded(call: W4Call, prepared: Prepared) -> _Coded:
    num_groups = call.scale.shape[1]
    coded = _Coded(scale=call.scale.data_ptr(), num_groups=num_groups)
    coded.group_units = _ONE_GROUP if num_groups == 1 else call.group_size // call.unit
    if prepared.scale is not None:
        coded.token_scale = prepared.scale.data_ptr()
    if call.zero is not None and prepared.sums is not None:
        coded.zero, coded.sums, coded.sum_stride = (
            call.zero.data_ptr(),
            prepared.sums.data_ptr(),
            prepared.sums.stride(0),
        )
    return coded


def _layout(call: W4Call, cut: W4Cut) -> tuple[int, int]:
    """Stages of the ring, and bytes of shared memory."""
    stage = ROWS * _STAGE_INPUTS + cut.columns * _STAGE_INPUTS * (1 if call.rounds else 2)
    if call.zero is not None:
        stage += -(-_STAGE_INPUTS // call.unit * cut.columns * 4 // 1024) * 1024
    rest = _STAGED_BYTES if cut.split == 1 and cut.columns >= 64 else 0
    stages = min((_SHARED_BYTES - rest) // stage, _MOST_STAGES)
    return stages, stages * stage + rest
