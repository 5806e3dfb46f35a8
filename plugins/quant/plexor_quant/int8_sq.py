"""The precision int8_sq: int8 weights and activations with exact integer sums, W8A8 of SmoothQuant.

SmoothQuant (Xiao et al., arXiv 2211.10438) moves outliers of the activations into the weights by a factor for each
input feature, which calibration finds. Without calibration every factor is one: loading a dense checkpoint rounds its
weights as they are, and tokens get their own scale while running. A calibrated checkpoint comes already smoothed, with
the factors folded into the layers before, and is multiplied by the same ops.
"""

from __future__ import annotations

import torch

from plexor_quant.per_channel import PerChannelFormat
from plexor_quant.rounding import round_int8


class Int8Format(PerChannelFormat):
    """Keeps "weight" int8 [out, in] and "scale" float32 [out], the row's largest magnitude over 127; a LinearFormat."""

    def __init__(self) -> None:
        super().__init__(torch.int8, round_int8, op="int8_linear", grouped_op="int8_grouped_linear")


class Int8StaticFormat(PerChannelFormat):
    """Keeps what Int8Format does; all inputs are rounded with one scale, which belongs to the checkpoint.

    input_scale: the number that one stands for.
    """

    def __init__(self, input_scale: float) -> None:
        super().__init__(torch.int8, round_int8, "int8_static_linear", "int8_static_grouped_linear", input_scale)
