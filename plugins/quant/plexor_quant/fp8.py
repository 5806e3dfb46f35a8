"""The precision fp8: e4m3 weights and activations, rounded plainly while loading and while running.

The number format is E4M3 of Micikevicius et al., "FP8 formats for deep learning" (arXiv 2209.05433).
"""

from __future__ import annotations

import torch

from plexor_quant.per_channel import PerChannelFormat
from plexor_quant.rounding import round_e4m3


class Fp8Format(PerChannelFormat):
    """Keeps "weight" e4m3 [out, in] and "scale" float32 [out], the row's largest magnitude over 448; a LinearFormat."""

    def __init__(self) -> None:
        super().__init__(torch.float8_e4m3fn, round_e4m3, op="fp8_linear", grouped_op="fp8_grouped_linear")


class Fp8StaticFormat(PerChannelFormat):
    """Keeps what Fp8Format does; all inputs are rounded with one scale, which belongs to the checkpoint.

    input_scale: the number that e4m3's one stands for.
    """

    def __init__(self, input_scale: float) -> None:
        super().__init__(torch.float8_e4m3fn, round_e4m3, "fp8_static_linear", "fp8_static_grouped_linear", input_scale)
