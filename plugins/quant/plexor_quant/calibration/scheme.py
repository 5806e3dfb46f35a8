"""What calibration must know of a precision: its grid, how it rounds activations, what it keeps, how it smooths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plexor.api import ConfigError
from plexor_quant.calibration.gptq import gptq
from plexor_quant.calibration.grid import Grid, Rounded, Rounding, nearest
from plexor_quant.calibration.smoothing import Factors, awq_factors, smoothquant_factors
from plexor_quant.packing import INT4_MAX, pack
from plexor_quant.rounding import E4M3_MAX, INT8_MAX, round_e4m3, round_int8

INT4_GROUPS: Mapping[str, int | None] = {"int4_wo": 128, "int4_wo_g64": 64, "int4_wo_g32": 32, "int4_wo_channel": None}
"""Precisions with 4-bit weights and activations as they are, and the groups of input features that share a scale."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """rounding: of weights. search: the cheaper rounding that stands in for it while factors are tried.

    factors: for each input feature; None leaves the layers' inputs as they are. round_input: x [T, in] -> what the
    precision's products make of it. keep: what the precision's format keeps of a rounded weight.
    """

    grid: Grid
    rounding: Rounding
    search: Rounding
    factors: Factors | None
    round_input: Callable[[Tensor], Tensor]
    keep: Callable[[Rounded], dict[str, Tensor]]


def find_scheme(precision: str) -> Scheme:
    """The best that is known for a precision; ConfigError for one that calibration does not serve."""
    e4m3, int8 = Grid(E4M3_MAX, torch.float32, codes=torch.float8_e4m3fn), Grid(INT8_MAX, torch.float32)
    schemes = {
        "fp8": Scheme(e4m3, gptq, nearest, smoothquant_factors, _through_e4m3, _keep_rows),
        "int8_sq": Scheme(int8, gptq, nearest, smoothquant_factors, _through_int8, _keep_rows),
        "w4a_fp8": Scheme(_int4(128), gptq, nearest, awq_factors, _through_e4m3, _keep_int4),
        "int8_wo": Scheme(int8, gptq, nearest, awq_factors, _as_they_are, _keep_rows),
    }
    for name, group_size in INT4_GROUPS.items():
        schemes[name] = Scheme(_int4(group_size), gptq, nearest, awq_factors, _as_they_are, _keep_int4)
    if precision not in schemes:
        raise ConfigError(f"calibration does not serve the precision {precision!r}: choose {' or '.join(schemes)}")
    return schemes[precision]


def _int4(group_size: int | None) -> Grid:
    return Grid(INT4_MAX, torch.bfloat16, group_size)


def _as_they_are(x: Tensor) -> Tensor:
    return x


def _through_e4m3(x: Tensor) -> Tensor:
    codes, scale = round_e4m3(x)
    return (codes.float() * scale).to(x.dtype)


def _through_int8(x: Tensor) -> Tensor:
    numbers, scale = round_int8(x)
    return (numbers.float() * scale).to(x.dtype)


def _keep_int4(rounded: Rounded) -> dict[str, Tensor]:
    return {"weight": pack(rounded.numbers), "scale": rounded.scale}


def _keep_rows(rounded: Rounded) -> dict[str, Tensor]:
    return {"weight": rounded.numbers, "scale": rounded.scale.squeeze(1)}
