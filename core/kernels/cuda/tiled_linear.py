"""Products of 17 rows and more on the tensor cores, over weights that stream through shared memory.

The kernel, its picture and its terms are in tiled_linear.cu. Norms, and rounding to the weight's numbers, come before
it, as kernels of their own.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plexor.kernels.cuda.call import BOX, Call, Epilogue, num_multiprocessors
from plexor.kernels.cuda.program import LINEAR_HEADER, load_program, tensor_map
from plexor.kernels.cuda.tiled_layout import TiledCut, instruction, piece_rows, tiled_layout

_SOURCES = (LINEAR_HEADER, Path(__file__).with_name("tiled_linear.cu"))
_MOST_SUMS = 80
"""Of a thread, for which an even share of the registers is enough."""


@dataclass(frozen=True, slots=True)
class TiledScales:
    """What turns sums of codes into numbers: float32 [T] for the rows of x, float32 [N] for those of the weight."""

    tokens: Tensor
    outputs: Tensor


class _ScalePointers(ctypes.Structure):
    _fields_ = (("tokens", ctypes.c_void_p), ("outputs", ctypes.c_void_p))


class TiledLinear:
    """The product of one layer. The weight's tensor maps are kept from call to call."""

    def __init__(self) -> None:
        self._weight_maps: dict[tuple[int, torch.Size, int, int], Any] = {}

    def launch(self, call: Call, tile: TiledCut, scales: TiledScales | None = None) -> None:
        """Queue it on the current stream; call.norm must have been applied, and its operands lie in pairs. x and weight
        are of one dtype that the tensor cores take; y is bfloat16 or float16.
        """
        assert call.norm is None
        assert call.x.dtype == call.weight.dtype
        x, weight, arguments = _in_twos(call.x), _in_twos(call.weight), call.arguments
        (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
        tokens, stages, shared_bytes = tiled_layout(num_rows, tile)
        pair = call.pair or 8
        piece = tile.outputs if call.pair is None else piece_rows(tile.outputs, pair)
        arguments.num_rows, arguments.num_inputs, arguments.num_outputs = num_rows, num_inputs, num_outputs
        arguments.pair, arguments.stages = pair, stages
        x_rows = 32 if num_rows <= 32 else tokens
        columns = tile.outputs // 2 if tokens == 64 else tile.outputs
        sums = columns // 2 if tokens < 256 else columns
        threads = 320 if sums <= _MOST_SUMS else 384
        defines = {
            "THREADS": threads,
            "TOKENS": tokens,
            "X_ROWS": x_rows,
            "OUTPUTS": tile.outputs,
            "PIECE": piece,
            "SPLIT": tile.split,
            "QUADS": tile.split == 1 and columns % 64 == 0 and _lies_in_eights(call),
            "SHARE": tile.share,
            "SUM": "int" if call.x.dtype == torch.int8 else "float",
            "MULTIPLY(d, a, b, adds)": instruction(columns, call.x.dtype),
            "SCALED": scales is not None,
            "HALF": call.y.dtype == torch.float16,
            "EPILOGUE": call.epilogue,
            "NARROW": call.narrow,
        }
        cluster = tile.split * tile.share
        program = load_program(_SOURCES, defines, threads, shared_bytes, cluster)
        x_map = tensor_map(x, (num_inputs, num_rows), (x.stride(0),), (BOX, x_rows // tile.share))
        num_teams = -(-num_outputs // (tile.outputs * tile.share)) * -(-num_rows // tokens)
        if tile.split == 1:
            num_teams = min(num_teams, num_multiprocessors(x) // tile.share)
        pointers = _ScalePointers()
        if scales is not None:
            pointers = _ScalePointers(scales.tokens.data_ptr(), scales.outputs.data_ptr())
        weight_map = self._weight_map(weight, call.epilogue, pair, piece)
        program.launch(num_teams * cluster, (weight_map, x_map, arguments, pointers))

    def _weight_map(self, weight: Tensor, epilogue: Epilogue, pair: int, piece: int) -> Any:
        """Eight rows, their eight partners, and so on by turns."""
        key = (weight.data_ptr(), weight.shape, pair, piece)
        if key not in self._weight_maps:
            num_outputs, num_inputs = weight.shape
            alone = epilogue in (Epilogue.STORE, Epilogue.ADD)
            distance, octets = (16, num_outputs // 16) if alone else (8, (num_outputs - pair) // 8)
            sizes = (BOX, 8, 2, octets, num_inputs // BOX)
            strides = (num_inputs, pair * num_inputs, distance * num_inputs, BOX)
            self._weight_maps[key] = tensor_map(weight, sizes, strides, (BOX, 8, 2, piece // 16, 1))
        return self._weight_maps[key]


def lies_in_pairs(call: Call) -> bool:
    """Whether bias and residual can be read two numbers at a time, as the kernel does."""
    arguments = call.arguments
    return not ((arguments.bias or 0) % 4 or (arguments.residual or 0) % 4 or arguments.residual_stride % 2)


def _lies_in_eights(call: Call) -> bool:
    """Whether the residual can be read and the cache written sixteen bytes at a time, as y can."""
    arguments = call.arguments
    places = (arguments.residual, arguments.keys, arguments.values)
    strides = (arguments.residual_stride, arguments.entry_stride)
    return not any((place or 0) % 16 for place in places) and not any(stride % 8 for stride in strides)


def _in_twos(codes: Tensor) -> Tensor:
    """Numbers of one byte as half as many of two, which is all that matters to a copy."""
    return codes.view(torch.bfloat16) if codes.element_size() == 1 else codes
