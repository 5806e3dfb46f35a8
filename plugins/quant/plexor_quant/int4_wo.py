"""The precisions int4_wo: 4-bit weights with a scale for each group, activations in the model's own dtype."""

from __future__ import annotations

from plexor_quant.per_group import PerGroupFormat


class Int4WeightFormat(PerGroupFormat):
    """Keeps "weight" uint8 [out, ceil(in / 2)], "scale" bfloat16 [out, ceil(in / group_size)]; a LinearFormat.

    group_size: consecutive input features that share a scale, even; a row's last group may be shorter. None: a row's.
    zero_points: keeps "zero" uint8 of scale's shape too.
    """

    def __init__(self, group_size: int | None = 128, zero_points: bool = False) -> None:
        super().__init__(group_size, "int4_wo_linear", "int4_wo_grouped_linear", zero_points)


def groups_of_64() -> Int4WeightFormat:
    return Int4WeightFormat(64)


def groups_of_32() -> Int4WeightFormat:
    return Int4WeightFormat(32)


def whole_rows() -> Int4WeightFormat:
    return Int4WeightFormat(None)
