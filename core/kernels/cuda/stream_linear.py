"""Products of at most 16 rows at the speed of the memory: the weight streams through shared memory, once.

The kernel, its picture and its terms are in stream_linear.cu. It multiplies weights as they lie in a checkpoint,
[N, K] row-major, so that products of many rows share them; norm, residual, gate, rotation and cache write are in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plexor.kernels.cuda.call import BOX, Call, num_multiprocessors
from plexor.kernels.cuda.choice import Stream
from plexor.kernels.cuda.layout import STREAM_WARPS, Variant, variant_for
from plexor.kernels.cuda.program import LINEAR_HEADER, STREAM_HEADER, load_program, tensor_map

_SOURCES = (LINEAR_HEADER, STREAM_HEADER, Path(__file__).with_name("stream_linear.cu"))


class StreamLinear:
    """The product of one layer. The weight's tensor maps are kept from call to call."""

    def __init__(self) -> None:
        self._weight_maps: dict[tuple[int, torch.Size, Variant, int], Any] = {}

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
        program = load_program(_SOURCES, defines, (STREAM_WARPS + 2) * 32, shared_bytes)
        boxes = num_inputs // BOX
        weight_map = self._weight_map(weight, variant, pair)
        x_map = tensor_map(x, (BOX, num_rows, boxes), (x.stride(0), BOX), (BOX, x_rows, variant.boxes))
        gain_map = x_map if norm is None else tensor_map(norm.gain, (BOX, boxes), (BOX,), (BOX, variant.boxes))
        num_tiles = num_outputs // (16 * variant.blocks)
        program.launch(min(num_tiles, num_multiprocessors(x)), (weight_map, x_map, gain_map, arguments))

    def _weight_map(self, weight: Tensor, variant: Variant, pair: int) -> Any:
        key = (weight.data_ptr(), weight.shape, variant, pair)
        if key not in self._weight_maps:
            num_outputs, num_inputs = weight.shape
            sizes = (BOX, num_outputs - pair, num_inputs // BOX, 2)
            strides = (num_inputs, BOX, pair * num_inputs)
            self._weight_maps[key] = tensor_map(weight, sizes, strides, (BOX, 8 * variant.blocks, variant.boxes, 2))
        return self._weight_maps[key]
