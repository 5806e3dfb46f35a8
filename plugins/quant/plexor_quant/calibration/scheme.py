"""What calibration must know of a precision: its grid, how it rounds activations, what it keeps, how it smooths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from plexor.api import ConfigError
from plexor_quant.calibration.gptq import gptq
from plexor_quant.calibration.grid import Grid, Rounded, Rounding, nearest
from plexor_quant.calibration.smoothing import Factors, awq_factors, smoothquant_factors
from plexor_quant.packing import INT4_MAX, pack
from plexor_quant.rounding import INT8_MAX, round_e4m3, round_int8

GROUP_SIZE = 128


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
    schemes = {"w4a_fp8": _w4a_fp8, "int8_sq": _int8_sq}
    if precision not in schemes:
        raise ConfigError(f"calibration does not serve the precision {precision!r}: choose {' or '.join(schemes)}")
    return schemes[precision]()


def _w4a_fp8() -> Scheme:
    grid = Grid(INT4_MAX, torch.bfloat16, GROUP_SIZE)
    return Scheme(grid, gptq, nearest, awq_factors, _through_e4m3, _keep_int4)


def _int8_sq() -> Scheme:
    grid = Grid(INT8_MAX, torch.float32)
    return Scheme(grid, gptq, nearest, smoothquant_factors, _through_int8, _keep_int8)


def _through_e4m3(x: Tensor) -> Tensor:
    codes, scale = round_e4m3(x)
    return (codes.float() * scale).to(x.dtype)


def _through_int8(x: Tensor) -> Tensor:
    numbers, scale = round_int8(x)
    return (numbers.float() * scale).to(x.dtype)


def _keep_int4(rounded: Rounded) -> dict[str, Tensor]:
    return {"weight": pack(rounded.numbers), "scale": rounded.scale}


def _keep_int8(rounded: Rounded) -> dict[str, Tensor]:
    return {"weight": rounded.numbers, "scale": rounded.scale.squeeze(1)}
