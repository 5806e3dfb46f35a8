"""The precision int8_wo: int8 weights with a scale for each output channel, activations in the model's own dtype."""

from __future__ import annotations

import torch

from plexor_quant.per_channel import PerChannelFormat
from plexor_quant.rounding import round_int8


class Int8WeightFormat(PerChannelFormat):
    """Keeps "weight" int8 [out, in] and "scale" float32 [out], the row's largest magnitude over 127; a LinearFormat."""

    def __init__(self) -> None:
        super().__init__(torch.int8, round_int8, op="int8_wo_linear", grouped_op="int8_wo_grouped_linear")
