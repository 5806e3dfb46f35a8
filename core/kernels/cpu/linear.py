"""The multiply of a dense linear layer on a CPU, over a copy of the weight in the layout that oneDNN streams best."""

from __future__ import annotations

import torch
from torch import Tensor

from plexor.extension.specs import Facts

MAX_WEIGHT = 1 << 22
"""Numbers of a weight that is copied: larger ones are read from memory at its speed whatever their layout, and a
second copy of them would be dear."""

TYPICAL_ROWS = 16
"""Rows for which the layout is chosen; it serves any number."""


class PackedLinear:
    """As plexor.kernels.reference.linear, for one layer: the copy is made when the layer is first used, and again when
    its weight is another one or has been written to.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._version = -1
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._weight is not weight or self._version != weight._version:
            self._weight, self._version = weight, weight._version
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
        if x.shape[0] == 0:
            return x.new_empty((0, weight.shape[0]))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return y


def refuses(facts: Facts) -> str | None:
    """Large weights, and builds of torch or processors without oneDNN for the dtype."""
    size = facts.shape.get("out_features", 0) * facts.shape.get("in_features", 0)
    if size > MAX_WEIGHT:
        return f"copies weights of at most {MAX_WEIGHT:,} numbers, this one has {size:,}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    if facts.dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    return None
