"""Products of at most 16 rows at the speed of the memory: the weight streams through shared memory, once.

The kernel, its picture and its terms are in stream_linear.cu. It multiplies weights as they lie in a checkpoint,
[N, K] row-major, so that products of many rows share them; norm, residual, gate, rotation and cache write are in it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver
from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.cuda.program import Program, checked, load

MAX_ROWS = 16
STORE, ADD, GATED, ROTARY = range(4)
_WARPS = 8
_BOX = 64
_MOST_STAGES = 16
_MOST_STEPS = 64
_SHARED_BYTES = 228 * 1024
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Variant:
    """How a product is cut.

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
        return self.depth // _BOX

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
        sum_bytes = 4 * _WARPS * ((2 if sums <= 128 else 1) * sums + 2 * self.columns)
        # A block costs 1 KB of the multiprocessor's memory besides what it asks for, and its barriers another.
        room = _SHARED_BYTES - 2048 - sum_bytes - resident
        stages = min(room // stage, _MOST_STAGES)
        return stages, stages * stage + resident + sum_bytes


def _kilobytes(num_bytes: int) -> int:
    return -(-num_bytes // 1024) * 1024


def variant_for(num_rows: int, num_outputs: int, num_inputs: int, pair: int | None) -> Variant:
    """The quickest on an H200 for the layers of published models: bench/NOTES.md."""
    narrow = num_outputs < 3072 and num_inputs >= 4096
    blocks, depth = (1, 512) if narrow else (2, 256)
    while num_outputs % (16 * blocks) or (pair or 8 * blocks) % (8 * blocks):
        blocks //= 2
    resident = num_rows == 1 and num_inputs <= depth * _MOST_STEPS
    return Variant(8 if num_rows <= 8 else 16, blocks, depth, resident)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Where rotated queries' partners go: tables [P, D / 2], positions and slots [T], the layer's cache."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    cache: LayerCache


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel serves these: few rows of half precision, at steps that the copy engine can take."""
    return (
        0 < x.shape[0] <= MAX_ROWS
        and x.dtype in _HALVES
        and weight.dtype == x.dtype
        and weight.is_contiguous()
        and weight.shape[0] % 16 == weight.shape[1] % _BOX == 0
        and x.stride(1) == 1
        and x.stride(0) % 8 == x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def takes_pairs(x: Tensor, weight: Tensor, pair: int) -> bool:
    """`takes`, and rows at a distance of `pair` belong together."""
    return takes(x, weight) and pair % 8 == 0


def takes_rotation(x: Tensor, weight: Tensor, rotation: Rotation) -> bool:
    """`takes_pairs` of a rotation of whole heads, into a cache that the kernel can write."""
    keys = rotation.cache["keys"]
    size = keys.shape[3]
    return (
        takes_pairs(x, weight, size // 2)
        and rotation.cos.shape[1] * 2 == size
        and keys.dtype in (x.dtype, torch.float8_e4m3fn)
        and keys.stride() == rotation.cache["values"].stride()
        and keys.stride()[2:] == (size, 1)
        and keys.stride(0) == keys.shape[1] * keys.stride(1)
    )


class _Arguments(ctypes.Structure):
    """Field for field what stream_linear.cu calls Arguments."""

    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("entry_stride", ctypes.c_longlong),
        ("y_stride", ctypes.c_longlong),
        ("residual_stride", ctypes.c_longlong),
        ("num_rows", ctypes.c_int),
        ("num_outputs", ctypes.c_int),
        ("num_inputs", ctypes.c_int),
        ("pair", ctypes.c_int),
        ("stages", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm before the product: gain [K], eps."""

    gain: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class _Call:
    """What a launch multiplies and what it does with the product. pair: distance of the rows that belong together."""

    x: Tensor
    weight: Tensor
    epilogue: int
    norm: Norm | None = None
    pair: int | None = None
    narrow: bool = False


class StreamLinear:
    """The product of one layer. Compiled variants and the weight's tensor maps are kept from call to call."""

    def __init__(self) -> None:
        self._programs: dict[tuple[int, ...], Program] = {}
        self._weight_maps: dict[tuple[int, Variant, int], Any] = {}

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K] times weight [N, K] -> [T, N]"""
        y = x.new_empty(x.shape[0], weight.shape[0])
        self._launch(_Call(x, weight, STORE), _Arguments(y=y.data_ptr(), y_stride=y.stride(0)))
        return y

    def normed(self, x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The norm of x [T, K] times weight -> [T, N]"""
        y = x.new_empty(x.shape[0], weight.shape[0])
        arguments = _Arguments(y=y.data_ptr(), y_stride=y.stride(0), bias=_address(bias))
        self._launch(_Call(x, weight, STORE, norm), arguments)
        return y

    def added(self, x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
        """residual [T, N] + x times weight -> [T, N]"""
        y = x.new_empty(x.shape[0], weight.shape[0])
        arguments = _Arguments(
            y=y.data_ptr(),
            y_stride=y.stride(0),
            bias=_address(bias),
            residual=residual.data_ptr(),
            residual_stride=residual.stride(0),
        )
        self._launch(_Call(x, weight, ADD), arguments)
        return y

    def gated(self, x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None) -> Tensor:
        """silu(first half) * second half of the norm of x times weight -> [T, N / 2]"""
        half = weight.shape[0] // 2
        y = x.new_empty(x.shape[0], half)
        arguments = _Arguments(y=y.data_ptr(), y_stride=y.stride(0), bias=_address(bias))
        self._launch(_Call(x, weight, GATED, norm, half), arguments)
        return y

    def rotated(self, x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, rotation: Rotation) -> Tensor:
        """Queries [T, N, D] of the norm of x times weight, turned; turned keys and values go into the cache."""
        keys, values = rotation.cache["keys"], rotation.cache["values"]
        num_kv_heads, size = keys.shape[2:]
        num_heads = weight.shape[0] // size - 2 * num_kv_heads
        q = x.new_empty(x.shape[0], num_heads, size)
        arguments = _Arguments(
            y=q.data_ptr(),
            y_stride=q.stride(0),
            bias=_address(bias),
            cos=rotation.cos.data_ptr(),
            sin=rotation.sin.data_ptr(),
            positions=rotation.positions.data_ptr(),
            slots=rotation.slots.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            entry_stride=keys.stride(1),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
        )
        narrow = keys.dtype == torch.float8_e4m3fn
        self._launch(_Call(x, weight, ROTARY, norm, size // 2, narrow), arguments)
        return q

    def _launch(self, call: _Call, arguments: _Arguments) -> None:
        x, weight, norm = call.x, call.weight, call.norm
        (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
        variant = variant_for(num_rows, num_outputs, num_inputs, call.pair)
        pair = call.pair or 8 * variant.blocks
        stages, shared_bytes = variant.layout(num_rows, num_inputs, norm is not None)
        arguments.num_rows, arguments.num_inputs, arguments.num_outputs = num_rows, num_inputs, num_outputs
        arguments.pair, arguments.stages, arguments.eps = pair, stages, 0.0 if norm is None else norm.eps
        x_rows = variant.x_rows(num_rows)
        defines = {
            "COLUMNS": variant.columns,
            "BLOCKS": variant.blocks,
            "DEPTH": variant.depth,
            "RESIDENT": variant.resident,
            "X_ROWS": x_rows,
            "HALF": x.dtype == torch.float16,
            "NORM": norm is not None,
            "EPILOGUE": call.epilogue,
            "NARROW": call.narrow,
        }
        program = self._program(defines, shared_bytes)
        boxes = num_inputs // _BOX
        weight_map = self._weight_map(weight, variant, pair)
        x_map = _tensor_map(x, (_BOX, num_rows, boxes), (x.stride(0), _BOX), (_BOX, x_rows, variant.boxes))
        gain_map = x_map if norm is None else _tensor_map(norm.gain, (_BOX, boxes), (_BOX,), (_BOX, variant.boxes))
        num_tiles = num_outputs // (16 * variant.blocks)
        num_blocks = min(num_tiles, _num_multiprocessors(x.device))
        program.launch(num_blocks, (weight_map, x_map, gain_map, arguments))

    def _program(self, defines: Mapping[str, int], shared_bytes: int) -> Program:
        key = (*defines.values(), shared_bytes)
        if key not in self._programs:
            source = Path(__file__).with_suffix(".cu")
            self._programs[key] = load(source, "stream_linear", defines, (_WARPS + 2) * 32, shared_bytes)
        return self._programs[key]

    def _weight_map(self, weight: Tensor, variant: Variant, pair: int) -> Any:
        key = (weight.data_ptr(), variant, pair)
        if key not in self._weight_maps:
            num_outputs, num_inputs = weight.shape
            sizes = (_BOX, num_outputs - pair, num_inputs // _BOX, 2)
            strides = (num_inputs, _BOX, pair * num_inputs)
            self._weight_maps[key] = _tensor_map(weight, sizes, strides, (_BOX, 8 * variant.blocks, variant.boxes, 2))
        return self._weight_maps[key]


def _tensor_map(tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """How the copy engine sees a tensor: sizes, innermost first; strides, in numbers, of all but the innermost."""
    kinds = driver.CUtensorMapDataType
    return checked(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,  # of the same size as float16, and only copied
            len(sizes),
            tensor.data_ptr(),
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(2 * stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,  # 256 bytes cost 8 % of the bandwidth
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
