"""How a checkpoint rounded a layer, and which formats of this plugin keep its weight as it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from plexor.api import CheckpointError, LinearFormat, TensorSource
from plexor_quant.fp8 import Fp8Format, Fp8StaticFormat
from plexor_quant.fp8_block import Fp8BlockFormat
from plexor_quant.inputs import InputsFormat
from plexor_quant.int4_wo import Int4WeightFormat
from plexor_quant.int8_sq import Int8Format, Int8StaticFormat
from plexor_quant.int8_wo import Int8WeightFormat
from plexor_quant.per_group import PerGroupFormat
from plexor_quant.sparse24 import Sparse24Fp8Format
from plexor_quant.sparse24_layout import GROUP
from plexor_quant.w4a_fp8 import W4AFp8Format, W4AFp8StaticFormat

INT4_GROUPS: Mapping[int, str] = MappingProxyType(
    {-1: "int4_wo_channel", 32: "int4_wo_g32", 64: "int4_wo_g64", 128: "int4_wo"}
)
"""The precision of 4-bit weights in groups of a size, -1 being all of a row; other sizes count as the usual one."""

LARGEST_GROUP = 128
"""Larger groups of 4-bit weights are kept as several of this size, where it divides them: kernels know that one."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """How the checkpoint has a layer's inputs rounded: to e4m3, to int8, not at all, or as no format here does.

    static: reads the one scale of all inputs; without it each token gets its own while running.
    """

    numbers: Literal["float8", "int8", "as they are", "other"] = "as they are"
    static: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """dtype and bits: as in Grid. block: rows and columns that share a scale, all of them where it is the sizes.

    zero_points, ordered, factored: whether there are any that mean something. sparse: the weight is stored as 2:4.
    """

    dtype: torch.dtype
    bits: int
    block: tuple[int, int]
    inputs: Inputs = Inputs()
    zero_points: bool = False
    ordered: bool = False
    factored: bool = False
    sparse: bool = False

    def formats(self, sizes: tuple[int, int], rows: range, columns: range) -> tuple[LinearFormat, ...]:
        """Those that keep this cut of a weight, the nearest first; none where it is read as a dense one."""
        size = self.block[1]
        whole = len(columns) == sizes[1]
        parted = columns.start % size or (columns.stop % size and columns.stop != sizes[1])
        if (parted and size < sizes[1]) or (self.ordered and not whole):
            return ()
        per_row = size >= sizes[1]
        if self.bits == 8:
            kept = self._eight_bits(rows, per_row)
            return (*self._sparse(columns), *kept) if kept and per_row else kept
        groups = self._four_bits(None if per_row else size)
        if not self.ordered and not self.factored:
            return groups
        return tuple(InputsFormat(each, self.ordered, self.factored) for each in groups)

    def _sparse(self, columns: range) -> tuple[LinearFormat, ...]:
        """Of 8-bit weights with a scale for each row."""
        whole = columns.start % GROUP == columns.stop % GROUP == 0
        return (Sparse24Fp8Format(),) if self.sparse and whole and self.dtype == torch.float8_e4m3fn else ()

    def _four_bits(self, size: int | None) -> tuple[PerGroupFormat, ...]:
        if size is not None and size % LARGEST_GROUP == 0:
            size = LARGEST_GROUP
        if size is not None and size % 2:
            return ()
        if self.inputs.numbers == "as they are":
            return (Int4WeightFormat(size, self.zero_points),)
        if self.inputs.numbers != "float8":
            return ()
        dynamic = W4AFp8Format(size, self.zero_points)
        if self.inputs.static is None:
            return (dynamic,)
        return W4AFp8StaticFormat(size, self.zero_points, self.inputs.static()), dynamic

    def _eight_bits(self, rows: range, per_row: bool) -> tuple[LinearFormat, ...]:
        if self.zero_points or self.ordered or self.factored:
            return ()
        if self.dtype == torch.int8:
            return self._int8() if per_row else ()
        if self.inputs.numbers != "float8":
            return ()
        if per_row:
            static = () if self.inputs.static is None else (Fp8StaticFormat(self.inputs.static()),)
            return (*static, Fp8Format())
        height, width = self.block
        apart = Fp8BlockFormat(1, width)
        is_whole = rows.start % height == 0 and len(rows) % height == 0
        return (Fp8BlockFormat(height, width), apart) if is_whole and height > 1 else (apart,)

    def _int8(self) -> tuple[LinearFormat, ...]:
        if self.inputs.numbers == "as they are":
            return (Int8WeightFormat(),)
        if self.inputs.numbers != "int8":
            return ()
        return (Int8Format(),) if self.inputs.static is None else (Int8StaticFormat(self.inputs.static()), Int8Format())


def static_scale(source: TensorSource, names: frozenset[str], name: str) -> Callable[[], float]:
    """Reads a scale of inputs; CheckpointError unless it is there and is one positive number."""

    def read() -> float:
        if name not in names:
            raise CheckpointError(
                f"{name!r} is missing, the scale of a layer's inputs that quantization_config of config.json promises: "
                "download the checkpoint again, or use --precision dense"
            )
        info = source.info(name)
        if math.prod(info.shape) != 1 or not info.dtype.is_floating_point:
            raise CheckpointError(
                f"tensor {name!r} of {info.file} is {str(info.dtype).removeprefix('torch.')} {list(info.shape)} where "
                "one number is due, the scale of a layer's inputs: download the checkpoint again"
            )
        scale = float(source.read(name).float())
        if not math.isfinite(scale) or scale <= 0:
            raise CheckpointError(
                f"tensor {name!r} of {info.file} gives {scale} for the scale of a layer's inputs: the checkpoint is "
                "unusable, download it again"
            )
        return scale

    return read
