"""Products of 17 rows and more on the tensor cores, over weights that stream through shared memory.

The kernel, its picture and its terms are in tiled_linear.cu. Norms, and rounding to the weight's numbers, come before
it, as kernels of their own.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plexor.kernels.cuda.call import BOX, Call, Epilogue, num_multiprocessors
from plexor.kernels.cuda.program import LINEAR_HEADER, load_program, tensor_map

_SOURCES = (LINEAR_HEADER, Path(__file__).with_name("tiled_linear.cu"))
_MOST_STAGES = 16
# Of the 227 KB that a block may have, its barriers take a part.
_SHARED_BYTES = 226 * 1024
_MOST_TOKENS = 256
_MOST_NUMBERS = 256 * 128
"""Of a tile, kept in registers."""

_MOST_SUMS = 80
"""Of a thread, for which an even share of the registers is enough."""


@dataclass(frozen=True, slots=True)
class TiledCut:
    """How a product is cut. outputs: weight rows of a tile. split: parts of k that blocks of a cluster take.
    share: tiles whose blocks, in one cluster, fetch the same rows of x together.
    """

    outputs: int
    split: int = 1
    share: int = 1

    def fits(self, num_rows: int, num_outputs: int, num_boxes: int, pair: int | None) -> bool:
        """Whether a product can be cut so. num_boxes: of 128 bytes of k."""
        tokens = tokens_for(num_rows)
        return (
            num_outputs % 16 == self.outputs % (32 if tokens == 64 else 16) == (pair or 8) % 8 == 0
            and 32 <= self.outputs <= 256
            and self.outputs * tokens <= _MOST_NUMBERS
            and (pair is None or _piece(self.outputs, pair) >= 32)
            and num_boxes >= self.split
            and (self.split == 1 or num_rows <= _MOST_TOKENS)
        )


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
        """Queue it on the current stream; call.norm must have been applied. x and weight are of one dtype that the
        tensor cores take; y is bfloat16 or float16.
        """
        assert call.norm is None
        assert call.x.dtype == call.weight.dtype
        x, weight, arguments = _in_twos(call.x), _in_twos(call.weight), call.arguments
        (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
        tokens, stages, shared_bytes = tiled_layout(num_rows, tile.outputs)
        pair = call.pair or 8
        piece = tile.outputs if call.pair is None else _piece(tile.outputs, pair)
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


def tokens_for(num_rows: int) -> int:
    """Rows of x in a tile."""
    return next((tokens for tokens in (64, 128) if num_rows <= tokens), _MOST_TOKENS)


def tiled_layout(num_rows: int, outputs: int) -> tuple[int, int, int]:
    """Rows of x in a tile, stages of the ring, bytes of shared memory."""
    tokens = tokens_for(num_rows)
    stage = (tokens + outputs) * BOX * 2
    stages = min(_SHARED_BYTES // stage, _MOST_STAGES)
    return tokens, stages, stages * stage


def instruction(columns: int, dtype: torch.dtype) -> str:
    """The body of a macro of d, a, b and adds: adds to the sums d, or replaces them by, the product of 64 rows, which
    the descriptor a names, and of so many columns, which b names, over 32 bytes.
    """
    sizes_and_types, signs, register = {
        torch.bfloat16: ("k16.f32.bf16.bf16", ", 1, 1, 0, 0", "f"),
        torch.float16: ("k16.f32.f16.f16", ", 1, 1, 0, 0", "f"),
        torch.float8_e4m3fn: ("k32.f32.e4m3.e4m3", ", 1, 1", "f"),
        torch.int8: ("k32.s32.s8.s8", "", "r"),
    }[dtype]
    num_sums = columns // 2
    places = ", ".join(f"%{i}" for i in range(num_sums))
    sums = ", ".join(f'"+{register}"((d)[{i}])' for i in range(num_sums))
    return (
        f'asm volatile("{{\\n.reg .pred adds;\\nsetp.ne.b32 adds, %{num_sums + 2}, 0;\\n'
        f"wgmma.mma_async.sync.aligned.m64n{columns}{sizes_and_types} "
        f'{{{places}}}, %{num_sums}, %{num_sums + 1}, adds{signs};\\n}}" '
        f': {sums} : "l"(a), "l"(b), "r"((int)(adds)))'
    )


def _piece(outputs: int, pair: int) -> int:
    """Weight rows of one copy: rows that belong together lie at one distance within blocks of 2 * pair rows."""
    return 2 * math.gcd(outputs // 2, pair)


def _in_twos(codes: Tensor) -> Tensor:
    """Numbers of one byte as half as many of two, which is all that matters to a copy."""
    return codes.view(torch.bfloat16) if codes.element_size() == 1 else codes
