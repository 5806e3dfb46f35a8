"""Four-bit weights: sixteen numbers in groups along the input features, two to a byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

INT4_MAX = 7.0
NIBBLE_MAX = 15
ZERO = 8
"""A nibble holds a number plus 8."""

PADDING = 0
"""The nibble beside the last weight of an odd row. It would mean -8, which rounding to -7..7 never yields, so it also
tells an odd row from an even one."""

SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny


def num_groups(in_features: int, group_size: int) -> int:
    """How many groups a row has; the last may be shorter."""
    return -(-in_features // group_size)


def round_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """weight [..., in] -> packed uint8 [..., ceil(in / 2)], scale bfloat16 [..., num_groups].

    The numbers are chosen against the scale as it is stored, so that bfloat16's rounding of it costs next to nothing.
    """
    in_features = weight.shape[-1]
    num = num_groups(in_features, group_size)
    padded = functional.pad(weight.float(), (0, num * group_size - in_features))
    grouped = padded.reshape(*weight.shape[:-1], num, group_size)
    scale = (grouped.abs().amax(dim=-1) / INT4_MAX).to(torch.bfloat16).clamp_min(SMALLEST_SCALE)
    numbers = (grouped / scale.unsqueeze(-1).float()).round().clamp(-INT4_MAX, INT4_MAX)
    return pack(numbers.flatten(-2)[..., :in_features].to(torch.int8)), scale


def round_uint4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight [..., in] -> packed uint8 [..., ceil(in / 2)], scale bfloat16 and zero uint8 [..., num_groups].

    A group's sixteen numbers run from its smallest weight to its largest, zero always among them. Its scale is rounded
    up to bfloat16, so that none is clipped by more than half a step.
    """
    in_features = weight.shape[-1]
    num = num_groups(in_features, group_size)
    padded = functional.pad(weight.float(), (0, num * group_size - in_features))
    grouped = padded.reshape(*weight.shape[:-1], num, group_size)
    low, high = grouped.amin(dim=-1).clamp_max(0), grouped.amax(dim=-1).clamp_min(0)
    scale = _rounded_up((high / NIBBLE_MAX - low / NIBBLE_MAX).clamp_min(SMALLEST_SCALE))
    zero = (-low / scale).round()
    nibbles = (grouped / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, NIBBLE_MAX)
    numbers = nibbles.flatten(-2)[..., :in_features] - ZERO
    return pack(numbers.to(torch.int8)), scale.to(torch.bfloat16), zero.to(torch.uint8)


def _rounded_up(scale: Tensor) -> Tensor:
    """The next bfloat16 numbers from these positive float32 ones on, still as float32."""
    return ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def pack(numbers: Tensor) -> Tensor:
    """int8 [..., in] from -8 to 7 -> uint8 [..., ceil(in / 2)]; an even feature in the low nibble.

    byte i:  | feature 2i + 1 | feature 2i |
    """
    packed = (numbers[..., 0::2] + ZERO).view(torch.uint8)
    high = (numbers[..., 1::2] + ZERO).view(torch.uint8)
    high <<= 4
    packed[..., : high.shape[-1]] |= high  # an odd row's last nibble stays PADDING
    return packed


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> int8 [..., 2 n] from -8 to 7, the padding of odd rows included."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return nibbles.to(torch.int8) - ZERO


def is_odd(packed: Tensor) -> bool:
    """Whether every row ends in padding."""
    return bool((packed[..., -1] >> 4 == PADDING).all())


def widen(packed: Tensor, scale: Tensor, in_features: int, group_size: int, zero: Tensor | None = None) -> Tensor:
    """packed [..., ceil(in / 2)], scale [..., num_groups] -> float32 [..., in], exactly what the nibbles mean.

    zero: uint8 [..., num_groups], the nibble that means zero in each group; None: 8 in all.
    """
    numbers = unpack(packed)[..., :in_features]
    if zero is not None:
        numbers -= spread(zero.to(torch.int8) - ZERO, in_features, group_size)
    return numbers.float() * spread(scale.float(), in_features, group_size)


def spread(each: Tensor, in_features: int, group_size: int) -> Tensor:
    """A number for each group [..., num_groups] -> one for each input feature [..., in]."""
    return each.repeat_interleave(group_size, dim=-1)[..., :in_features]
