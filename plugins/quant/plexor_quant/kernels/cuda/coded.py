"""What a product with a coded weight multiplies: codes, their scales, and how the op rounds its activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from plexor.api import Call
from plexor_quant.kernels.reference.fused import row_group_size

ALIGNMENT = 16
"""Bytes at whose multiples the copy engine begins."""


class Activations(Enum):
    """What an op makes of its activations, row by row, before it multiplies."""

    AS_THEY_ARE = "as they are"
    E4M3 = "e4m3"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight [N, K] as a format keeps it.

    weight: e4m3 or int8 [N, K], or uint8 [N, K / 2] with two features to a byte. scale: float32 [N], or bfloat16
    [N, groups] for four bits. zero: uint8 [N, groups], the nibble that means zero; None: 8. group_size: features that
    share a scale, K where all of a row's do.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int

    @property
    def num_inputs(self) -> int:
        return self.weight.shape[1] * (2 if self.is_packed else 1)

    @property
    def is_packed(self) -> bool:
        """Whether a byte holds two features."""
        return self.weight.dtype == torch.uint8

    @property
    def num_groups(self) -> int:
        """Scales of a row."""
        return self.scale.shape[1] if self.scale.dim() == 2 else 1

    def lie_well(self) -> bool:
        """Whether the copy engine can take them as they lie."""
        parts = [part for part in (self.weight, self.scale, self.zero) if part is not None]
        return all(part.is_contiguous() and part.data_ptr() % ALIGNMENT == 0 for part in parts)


def codes_of(stored: Mapping[str, Tensor], num_inputs: int) -> Codes:
    """What a fused op is given, for x [T, num_inputs]."""
    weight, scale = stored["weight"], stored["scale"]
    size = row_group_size(num_inputs, scale.shape[1]) if scale.dim() == 2 else num_inputs
    return Codes(weight, scale, stored.get("zero"), size)


@dataclass(frozen=True, slots=True)
class CodedCall:
    """One product: the core's call, whose weight is that of `codes`, and what else its kernels need to know."""

    call: Call
    codes: Codes
    activations: Activations

    @property
    def num_rows(self) -> int:
        return self.call.num_rows

    def lies_well(self) -> bool:
        """Whether the copy engine can take activations and codes as they lie."""
        x = self.call.x
        return (
            x.dtype in (torch.bfloat16, torch.float16)
            and x.shape[1] == self.codes.num_inputs
            and x.stride(1) == 1
            and x.stride(0) * x.element_size() % ALIGNMENT == x.data_ptr() % ALIGNMENT == 0
            and self.codes.lie_well()
        )
