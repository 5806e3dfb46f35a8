"""Arguments on which every provider of products with norm, residual, gate or rotation is held to its reference.

Where an op rounds its activations, each row is of numbers that rounding leaves as they are, so that providers which do
not round agree with those that do: codes whose largest is the grid's, times a power of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from plexor.api import LinearFormat, Sample
from plexor_quant.fp8 import Fp8Format
from plexor_quant.int4_wo import Int4WeightFormat
from plexor_quant.int8_sq import Int8Format
from plexor_quant.int8_wo import Int8WeightFormat
from plexor_quant.rounding import E4M3_MAX, INT8_MAX, to_e4m3
from plexor_quant.w4a_fp8 import W4AFp8Format

EPS = 1e-5
BLOCK_SIZE = 16
# (rows, in, out): at both sides of 8 and 16 rows.
SIZES = (
    (0, 256, 32),
    (1, 256, 48),
    (2, 512, 64),
    (3, 2304, 80),
    (8, 768, 32),
    (9, 256, 128),
    (16, 1024, 96),
    (17, 512, 128),
    (40, 256, 256),
)
# What takes a CPU long: rings that are filled more than once, more tiles than a GPU has multiprocessors.
LONG = ((1, 4352, 2176), (8, 768, 4320))
# (name, slots, in, query heads, KV heads, head size, features that turn)
HEADS: Sequence[tuple[str, Sequence[int], int, int, int, int, int]] = (
    ("no tokens", (), 256, 2, 1, 16, 16),
    ("one token", (17,), 256, 1, 1, 64, 64),
    ("padding between tokens", (20, -1, 0), 512, 6, 2, 32, 32),
    ("partial rotary", (1, 40), 256, 2, 2, 32, 16),
    ("eight tokens, heads of 128", (*range(8, 15), -1), 256, 2, 1, 128, 128),
    ("sixteen tokens", (*range(16),), 256, 3, 1, 64, 64),
    ("seventeen tokens", (*range(30, 47),), 256, 2, 1, 64, 64),
)
STORAGES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class Maker:
    """Makes tensors on a device from one seed, the same on every device, for one number format."""

    def __init__(self, number_format: LinearFormat, grid: float, device: torch.device, dtype: torch.dtype) -> None:
        """grid: the largest of the numbers that activations are rounded to, 0 where they are not."""
        self._format, self._grid = number_format, grid
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator().manual_seed(41)

    def normal(self, *shape: int) -> Tensor:
        return self._numbers(*shape).to(self._device, self._dtype)

    def gain(self, size: int) -> Tensor:
        """Powers of two, which keep a row on its grid."""
        return torch.exp2(torch.randint(-1, 2, (size,), generator=self._generator)).to(self._device, self._dtype)

    def rows(self, num_rows: int, size: int, gain: Tensor | None = None) -> Tensor:
        """Activations [num_rows, size] that are on their grid, once they are multiplied with gain."""
        x = self._numbers(num_rows, size + 64)[:, :size]
        if self._grid == E4M3_MAX:
            x = to_e4m3(60 * x).float()
        elif self._grid == INT8_MAX:
            x = (30 * x).round().clamp(-INT8_MAX, INT8_MAX)
        if self._grid:
            x[:, size // 3] = self._grid
            x = x * torch.exp2(torch.randint(-8, -4, (num_rows, 1), generator=self._generator))
        wide = torch.zeros(num_rows, size + 64, dtype=self._dtype, device=self._device)
        wide[:, 32 : 32 + size] = x.to(self._device) / (1.0 if gain is None else gain.float())
        return wide[:, 32 : 32 + size]

    def layer(
        self, inputs: int, outputs: int, with_bias: bool
    ) -> tuple[dict[str, Tensor], Tensor | None, tuple[tuple[str, int], ...]]:
        """What is stored, the bias, and the sizes a model states."""
        weight = self._numbers(outputs, inputs) * inputs**-0.5
        stored = {name: part.contiguous().to(self._device) for name, part in self._format.convert(weight).items()}
        sizes = (("in_features", inputs), ("out_features", outputs))
        return (stored, self.normal(outputs), (*sizes, ("bias", 1))) if with_bias else (stored, None, sizes)

    def integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def cache(self, num_kv_heads: int, size: int, storage: torch.dtype) -> dict[str, Tensor]:
        """Three blocks with entries in them, so that overwriting the wrong ones shows."""
        shape = (3, BLOCK_SIZE, num_kv_heads, size)
        return {part: self._numbers(*shape).to(storage).to(self._device) for part in ("keys", "values")}

    def tables(self, turning: int) -> tuple[Tensor, Tensor]:
        """cos and sin [32, turning / 2]."""
        angle = torch.arange(32).unsqueeze(1) * 100.0 ** (-torch.arange(0, turning, 2) / turning)
        return angle.cos().to(self._device), angle.sin().to(self._device)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)


Formats = Sequence[tuple[LinearFormat, float]]
"""Formats of one op, and the grids of their activations."""


def _makers(formats: Formats, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Maker]]:
    for place, (number_format, grid) in enumerate(formats):
        yield f"format {place}, ", Maker(number_format, grid, device, dtype)


def norm_linear(formats: Formats, device: torch.device, dtype: torch.dtype, outputs_each: int = 1) -> Iterable[Sample]:
    """outputs_each: outputs of the layer for each of the op."""
    for prefix, make in _makers(formats, device, dtype):
        for place, (rows, inputs, outputs) in enumerate(SIZES + (LONG if device.type == "cuda" else ())):
            stored, bias, sizes = make.layer(inputs, outputs_each * outputs, place % 2 == 1)
            gain = make.gain(inputs)
            args = (make.rows(rows, inputs, gain), gain, EPS, stored, bias)
            yield Sample(f"{prefix}{rows} rows, {inputs} to {outputs}", args, shape=sizes)


def linear_add(formats: Formats, device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for prefix, make in _makers(formats, device, dtype):
        for place, (rows, inputs, outputs) in enumerate(SIZES + (LONG if device.type == "cuda" else ())):
            stored, bias, sizes = make.layer(inputs, outputs, place % 2 == 0)
            args = (make.rows(rows, inputs), stored, make.normal(rows, outputs), bias)
            yield Sample(f"{prefix}{rows} rows, {inputs} to {outputs}", args, spent=(2,), shape=sizes)


def norm_rotary_linear(formats: Formats, device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for prefix, make in _makers(formats, device, dtype):
        for place, (name, slots, inputs, heads, kv_heads, size, turning) in enumerate(HEADS):
            for storage in STORAGES:
                stored, bias, sizes = make.layer(inputs, (heads + 2 * kv_heads) * size, place % 2 == 1)
                gain = make.gain(inputs)
                positions = make.integers([(7 * token + 3) % 32 for token in range(len(slots))])
                where = (*make.tables(turning), positions, make.integers(slots), make.cache(kv_heads, size, storage))
                kept = str(storage).removeprefix("torch.")
                heads_sizes = (("num_heads", heads), ("num_kv_heads", kv_heads), ("head_size", size))
                yield Sample(
                    f"{prefix}{name}, {kept}",
                    (make.rows(len(slots), inputs, gain), gain, EPS, stored, *where, bias),
                    written=(8,),
                    shape=(*sizes, *heads_sizes, ("rotary_size", turning)),
                    kv_dtype=kept,
                )


FP8: Formats = ((Fp8Format(), E4M3_MAX),)
INT8: Formats = ((Int8Format(), INT8_MAX),)
INT8_WO: Formats = ((Int8WeightFormat(), 0.0),)
W4A_FP8: Formats = ((W4AFp8Format(), E4M3_MAX), (W4AFp8Format(128, True), E4M3_MAX))
INT4_WO: Formats = (
    (Int4WeightFormat(), 0.0),
    (Int4WeightFormat(64, True), 0.0),
    (Int4WeightFormat(32), 0.0),
    (Int4WeightFormat(None, True), 0.0),
)

fp8_norm_linear = partial(norm_linear, FP8)
fp8_linear_add = partial(linear_add, FP8)
fp8_norm_gated_linear = partial(norm_linear, FP8, outputs_each=2)
fp8_norm_rotary_linear = partial(norm_rotary_linear, FP8)

int8_norm_linear = partial(norm_linear, INT8)
int8_linear_add = partial(linear_add, INT8)
int8_norm_gated_linear = partial(norm_linear, INT8, outputs_each=2)
int8_norm_rotary_linear = partial(norm_rotary_linear, INT8)

w4a_fp8_norm_linear = partial(norm_linear, W4A_FP8)
w4a_fp8_linear_add = partial(linear_add, W4A_FP8)
w4a_fp8_norm_gated_linear = partial(norm_linear, W4A_FP8, outputs_each=2)
w4a_fp8_norm_rotary_linear = partial(norm_rotary_linear, W4A_FP8)

int8_wo_norm_linear = partial(norm_linear, INT8_WO)
int8_wo_linear_add = partial(linear_add, INT8_WO)
int8_wo_norm_gated_linear = partial(norm_linear, INT8_WO, outputs_each=2)
int8_wo_norm_rotary_linear = partial(norm_rotary_linear, INT8_WO)

int4_wo_norm_linear = partial(norm_linear, INT4_WO)
int4_wo_linear_add = partial(linear_add, INT4_WO)
int4_wo_norm_gated_linear = partial(norm_linear, INT4_WO, outputs_each=2)
int4_wo_norm_rotary_linear = partial(norm_rotary_linear, INT4_WO)
