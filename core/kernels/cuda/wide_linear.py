"""Products of 17 to 256 rows on the tensor cores, over weights that stream through shared memory.

The kernel, its picture and its terms are in wide_linear.cu. Norms come before it, as a kernel of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plexor.kernels.cuda.call import BOX, Call, num_multiprocessors
from plexor.kernels.cuda.choice import Wide
from plexor.kernels.cuda.layout import wide_layout
from plexor.kernels.cuda.program import LINEAR_HEADER, load_program, tensor_map

_ROWS = 64
_THREADS = 320
_SOURCES = (LINEAR_HEADER, Path(__file__).with_name("wide_linear.cu"))


class WideLinear:
    """The product of one layer. The weight's tensor map is kept from call to call."""

    def __init__(self) -> None:
        self._weight_maps: dict[tuple[int, torch.Size, int], Any] = {}

    def launch(self, call: Call, cut: Wide) -> None:
        """Queue it on the current stream, cut in one of its possible ways; call.norm must have been applied."""
        x, weight, arguments = call.x, call.weight, call.arguments
        (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
        columns, stages, shared_bytes = wide_layout(num_rows)
        split = cut.split
        pair = call.pair or _ROWS
        arguments.num_rows, arguments.num_inputs, arguments.num_outputs = num_rows, num_inputs, num_outputs
        arguments.pair, arguments.stages = pair, stages
        defines = {
            "COLUMNS": columns,
            "SPLIT": split,
            "HALF": x.dtype == torch.float16,
            "EPILOGUE": call.epilogue,
            "NARROW": call.narrow,
        }
        program = load_program(_SOURCES, defines, _THREADS, shared_bytes, cluster=split)
        x_map = tensor_map(x, (num_inputs, num_rows), (x.stride(0),), (BOX, columns))
        num_tiles = num_outputs // (2 * _ROWS)
        num_blocks = num_tiles * split if split > 1 else min(num_tiles, num_multiprocessors(x))
        program.launch(num_blocks, (self._weight_map(weight, pair), x_map, arguments))

    def _weight_map(self, weight: Tensor, pair: int) -> Any:
        """Eight rows of the first group, eight of the second, and so on by turns."""
        key = (weight.data_ptr(), weight.shape, pair)
        if key not in self._weight_maps:
            num_outputs, num_inputs = weight.shape
            sizes = (BOX, 8, 2, (num_outputs - pair) // 8, num_inputs // BOX)
            strides = (num_inputs, pair * num_inputs, 8 * num_inputs, BOX)
            self._weight_maps[key] = tensor_map(weight, sizes, strides, (BOX, 8, 2, 8, 1))
        return self._weight_maps[key]
