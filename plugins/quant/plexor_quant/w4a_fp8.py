"""The precision w4a_fp8: 4-bit weights with a scale for each group of input features, e4m3 activations."""

from __future__ import annotations

from plexor_quant.per_group import PerGroupFormat


class W4AFp8Format(PerGroupFormat):
    """Keeps "weight" uint8 [out, ceil(in / 2)], "scale" bfloat16 [out, ceil(in / group_size)]; a LinearFormat.

    group_size: consecutive input features that share a scale, even; a row's last group may be shorter. None: a row's.
    zero_points: keeps "zero" uint8 of scale's shape too.
    """

    def __init__(self, group_size: int | None = 128, zero_points: bool = False) -> None:
        super().__init__(group_size, "w4a_fp8_linear", "w4a_fp8_grouped_linear", zero_points)


class W4AFp8StaticFormat(PerGroupFormat):
    """Keeps what W4AFp8Format does; all inputs are rounded with one scale, which belongs to the checkpoint.

    input_scale: the number that e4m3's one stands for.
    """

    def __init__(self, group_size: int | None, zero_points: bool, input_scale: float) -> None:
        super().__init__(group_size, "w4a_fp8_static_linear", "w4a_fp8_static_grouped_linear", zero_points, input_scale)
