"""Products of at most 16 rows at the speed of the memory: the weight streams through shared memory, once.

The kernel, its picture and its terms are in stream_linear.cu. It multiplies weights as they lie in a checkpoint,
[N, K] row-major, so that products of many rows share them; norm, residual, gate, rotation and cache write are in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plexor.kernels.cuda.call import BOX, Call, num_multiprocessors, tensor_map
from plexor.kernels.cuda.choice import Stream
from plexor.kernels.cuda.program import Program, load

_WARPS = 8
_MOST_STAGES = 16
_MOST_STEPS = 64
# Of a multiprocessor's 228 KB: what is left lets the programs of an attention kernel start beside a product.
_SHARED_BYTES = 184 * 1024


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
        return self.depth // BOX

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


def variant_for(cut: Stream, num_rows: int, num_inputs: int) -> Variant:
    """What a cut means for so many rows; one row is kept, if its stages are not too many."""
    resident = num_rows == 1 and num_inputs <= cut.depth * _MOST_STEPS
    return Variant(8 if num_rows <= 8 else 16, cut.blocks, cut.depth, resident)


class StreamLinear:
    """The product of one layer. Compiled variants and the weight's tensor maps are kept from call to call."""

    def __init__(self) -> None:
        self._programs: dict[tuple[int, ...], Program] = {}
        self._weight_maps: dict[tuple[int, Variant, int], Any] = {}

    def launch(self, call: Call, cut: Stream) -> None:
        """Queue it on the current stream, cut in one of its possible ways."""
        x, weight, norm, arguments = call.x, call.weight, call.norm, call.arguments
        (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
        variant = variant_for(cut, num_rows, num_inputs)
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
        boxes = num_inputs // BOX
        weight_map = self._weight_map(weight, variant, pair)
        x_map = tensor_map(x, (BOX, num_rows, boxes), (x.stride(0), BOX), (BOX, x_rows, variant.boxes))
        gain_map = x_map if norm is None else tensor_map(norm.gain, (BOX, boxes), (BOX,), (BOX, variant.boxes))
        num_tiles = num_outputs // (16 * variant.blocks)
        program.launch(min(num_tiles, num_multiprocessors(x)), (weight_map, x_map, gain_map, arguments))

    def _program(self, defines: Mapping[str, int], shared_bytes: int) -> Program:
        key = (*defines.values(), shared_bytes)
        if key not in self._programs:
            self._programs[key] = load("stream_linear", defines, (_WARPS + 2) * 32, shared_bytes)
        return self._programs[key]

    def _weight_map(self, weight: Tensor, variant: Variant, pair: int) -> Any:
        key = (weight.data_ptr(), variant, pair)
        if key not in self._weight_maps:
            num_outputs, num_inputs = weight.shape
            sizes = (BOX, num_outputs - pair, num_inputs // BOX, 2)
            strides = (num_inputs, BOX, pair * num_inputs)
            self._weight_maps[key] = tensor_map(weight, sizes, strides, (BOX, 8 * variant.blocks, variant.boxes, 2))
        return self._weight_maps[key]
