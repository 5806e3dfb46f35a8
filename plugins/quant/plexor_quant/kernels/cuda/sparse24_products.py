"""Products with 2:4 weights in CUDA C++: streamed for few rows, widened for the library's product for more."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plexor.api import LINEAR_HEADER, Program, load_program, num_multiprocessors

MAX_ROWS = 16
"""Rows of x that are streamed to. The kernel can take 32, and x that does not stay in shared memory; neither has been
held to the reference on a GPU yet, so that `streams` refuses them (`python bench/sparse24.py` checks both)."""

RESIDENT_BYTES = 96 << 10
"""Of x that a block of threads keeps in shared memory: two blocks share a multiprocessor's."""

CHUNK = 64
PACKED_ROWS = 64
"""The library's layout has the index of so many rows together."""

ALIGNMENT = 16
_STREAM = Path(__file__).with_name("sparse24_linear.cu")
_WIDEN = Path(__file__).with_name("sparse24_widen.cu")
_PACK = Path(__file__).with_name("sparse24_pack.cu")
_COPY_THREADS = 256
_COPY_BLOCKS = 8
"""On a multiprocessor, of kernels that put a weight into another layout."""
_HEADER = {"HALF": 0, "EPILOGUE": 0, "NARROW": 0}
"""What the header asks for and these kernels make no use of."""


class StreamArguments(ctypes.Structure):
    """SparseArguments of sparse24_linear.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("num_rows", ctypes.c_int),
        ("num_outputs", ctypes.c_int),
        ("num_inputs", ctypes.c_int),
    )


class WidenArguments(ctypes.Structure):
    """WidenArguments of sparse24_widen.cu."""

    _fields_ = (
        ("kept", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("num_pieces", ctypes.c_longlong),
    )


class PackArguments(ctypes.Structure):
    """PackArguments of sparse24_pack.cu."""

    _fields_ = (
        ("index", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("num_outputs", ctypes.c_int),
        ("num_inputs", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True)
class Cut:
    """tiles: of 16 weight rows that a block of threads takes at once. warps: of a block. chunks: of 64 features that a
    warp takes at once. blocks: that a multiprocessor shall hold.
    """

    tiles: int
    warps: int
    chunks: int
    blocks: int


def cut_for(num_rows: int, itemsize: int) -> Cut:
    """Rows of x are shared by the weight rows of a block: more of these where there are many of those."""
    if num_rows <= 2:
        return Cut(1, 8, 4 // itemsize, 2)
    if num_rows > 16:
        return Cut(1, 8, 1, 2)
    return Cut(2, 8, 2 // itemsize, 2)


def streams(x: Tensor, kept: Tensor, index: Tensor) -> bool:
    """Whether there are rows, few enough, and everything can be loaded in whole chunks."""
    return (
        0 < x.shape[0] <= MAX_ROWS
        and _resident_bytes(x) <= RESIDENT_BYTES
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[1] % CHUNK == 0
        and x.stride(1) == 1
        and x.stride(0) * x.element_size() % ALIGNMENT == x.data_ptr() % ALIGNMENT == 0
        and _lies_well(kept)
        and _lies_well(index)
    )


def stream(x: Tensor, kept: Tensor, index: Tensor, scale: Tensor | None, cut: Cut | None = None) -> Tensor:
    """x [T, K] times what kept [N, K / 2] and index [N, K / 8] mean, and for e4m3 scale float32 [N] -> [T, N]."""
    num_rows, num_inputs = x.shape
    num_outputs = kept.shape[0]
    cut = cut or cut_for(num_rows, kept.element_size())
    y = x.new_empty(num_rows, num_outputs)
    arguments = StreamArguments(
        x.data_ptr(),
        kept.data_ptr(),
        index.data_ptr(),
        None if scale is None else scale.data_ptr(),
        y.data_ptr(),
        x.stride(0),
        num_rows,
        num_outputs,
        num_inputs,
    )
    program = stream_program(cut, x, kept.dtype)
    num_tiles = -(-num_outputs // (16 * cut.tiles))
    program.launch(min(num_tiles, cut.blocks * num_multiprocessors(x)), (arguments,))
    return y


def stream_program(cut: Cut, x: Tensor, weight_dtype: torch.dtype) -> Program:
    num_rows, resident_bytes = x.shape[0], _resident_bytes(x)
    resident = resident_bytes <= RESIDENT_BYTES
    defines = {
        "TILES_M": cut.tiles,
        "TILES_N": 1 if num_rows <= 8 else 2 if num_rows <= 16 else 4,
        "WARPS": cut.warps,
        "CHUNKS": cut.chunks,
        "BLOCKS": cut.blocks,
        "RESIDENT": resident,
        "HALF": x.dtype == torch.float16,
        "NARROW_WEIGHT": weight_dtype == torch.float8_e4m3fn,
        "EPILOGUE": 0,
        "NARROW": 0,
    }
    return load_program((LINEAR_HEADER, _STREAM), defines, cut.warps * 32, resident_bytes if resident else 0)


def _resident_bytes(x: Tensor) -> int:
    return x.shape[0] * (x.shape[1] + 8) * 2  # token_stride of sparse24_linear.cu


def widens(x: Tensor, kept: Tensor, index: Tensor) -> bool:
    return x.shape[1] % CHUNK == 0 and _lies_well(kept) and _lies_well(index)


def widened(kept: Tensor, index: Tensor) -> Tensor:
    """As plexor_quant.sparse24_layout.widen, for kept [N, K / 2] of one or two bytes each and K in multiples of 64."""
    num_outputs, num_kept = kept.shape
    dense = kept.new_empty(num_outputs, 2 * num_kept)
    num_pieces = dense.numel() // 16
    arguments = WidenArguments(kept.data_ptr(), index.data_ptr(), dense.data_ptr(), num_pieces)
    program = load_program((LINEAR_HEADER, _WIDEN), {**_HEADER, "SIZE": kept.element_size()}, _COPY_THREADS, 0)
    program.launch(_copy_blocks(num_pieces, kept), (arguments,))
    return dense


def packs(x: Tensor, kept: Tensor, index: Tensor) -> bool:
    """Whether `packed` takes them: K in multiples of 64, and N."""
    return widens(x, kept, index) and kept.dtype == x.dtype and kept.shape[0] % PACKED_ROWS == 0


def packed(kept: Tensor, index: Tensor) -> Tensor:
    """kept [N, K / 2] of two bytes each and index [N, K / 8] as cuSPARSELt 0.8 has them one behind the other: the
    numbers as they are, then the index in the order of sparse24_pack.cu, [N, K * 9 / 16].
    """
    num_outputs, num_kept = kept.shape
    both = kept.new_empty(num_outputs * num_kept * 9 // 8)
    numbers, order = both.split((kept.numel(), both.numel() - kept.numel()))
    numbers.copy_(kept.view(-1))
    arguments = PackArguments(index.data_ptr(), order.data_ptr(), num_outputs, 2 * num_kept)
    program = load_program((LINEAR_HEADER, _PACK), _HEADER, _COPY_THREADS, 0)
    program.launch(_copy_blocks(index.numel() // 16, kept), (arguments,))
    return both.view(num_outputs, -1)


def _copy_blocks(num_threads: int, tensor: Tensor) -> int:
    return min(-(-num_threads // _COPY_THREADS), _COPY_BLOCKS * num_multiprocessors(tensor))


def _lies_well(rows: Tensor) -> bool:
    return rows.is_contiguous() and rows.data_ptr() % ALIGNMENT == 0
