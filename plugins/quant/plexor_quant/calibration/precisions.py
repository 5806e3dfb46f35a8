"""Each precision's own calibration, as the plugin offers it: what is known to be best for its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from plexor.api import Build, Decoder
from plexor_quant.calibration.layers import TextCalibration
from plexor_quant.calibration.scheme import find_scheme


def _start(
    precision: str, decoder: Decoder, build: Build, token_ids: Sequence[int], window: int, gain_dtype: torch.dtype
) -> TextCalibration:
    return TextCalibration(decoder, build, token_ids, window, find_scheme(precision), gain_dtype)


fp8 = partial(_start, "fp8")
int8_sq = partial(_start, "int8_sq")
w4a_fp8 = partial(_start, "w4a_fp8")
int8_wo = partial(_start, "int8_wo")
int4_wo = partial(_start, "int4_wo")
int4_wo_g64 = partial(_start, "int4_wo_g64")
int4_wo_g32 = partial(_start, "int4_wo_g32")
int4_wo_channel = partial(_start, "int4_wo_channel")
