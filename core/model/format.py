"""The precision contract: how a number format stores, converts and multiplies the weight of a linear layer.

One format object serves dense layers and expert stacks, because a stack is only a shape with groups > 1. No
architecture knows a format and no format knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from plexor.checkpoint.view import Grid
    from plexor.kernels.table import KernelTable


@dataclass(frozen=True, slots=True)
class LinearShape:
    """The sizes of a weight on this rank: [out_features, in_features], or [groups, out_features, in_features]."""

    out_features: int
    in_features: int
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor that is kept for a weight.

    shape: without the groups axis, which is put in front when groups > 1. out_axis, in_axis: the axis that follows the
    weight's output or input features (parts such as q, k, v lie side by side along out_axis), or None.
    rows: how many output features each entry along out_axis is for; parts are then whole multiples of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    out_axis: int | None
    in_axis: int | None
    rows: int = 1


Multiply = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""(x [T, in], stored) -> [T, out]"""

GroupedMultiply = Callable[[Tensor, Mapping[str, Tensor], Tensor], Tensor]
"""(x [M, in] sorted by group, stored, group_end [groups] int32: one past each group's last row) -> [M, out]"""


class LinearFormat(Protocol):
    """What a precision plugin's `format` target returns."""

    def storage(self, shape: LinearShape, dtype: torch.dtype) -> tuple[Stored, ...]:
        """What is kept for a weight of this shape in a model whose activations have this dtype."""
        ...

    def convert(self, weight: Tensor) -> dict[str, Tensor]:
        """From a dense weight [..., out, in] to what `storage` names, each with the same leading axes."""
        ...

    def load(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the layout of a checkpoint to the layout that `bind` multiplies; the identity where they agree."""
        ...

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Back to a dense float32 weight [..., out, in]: what the multiply is held to in tests."""
        ...

    def bind(self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Multiply:
        """The multiply for one dense layer, through ops that the table chooses a kernel for."""
        ...

    def bind_grouped(
        self, table: KernelTable, shape: LinearShape, dtype: torch.dtype, device: torch.device
    ) -> GroupedMultiply:
        """The multiply for an expert stack."""
        ...


@runtime_checkable
class GridFormat(Protocol):
    """A LinearFormat that can keep the very numbers that a checkpoint stores, where its grids can be one of its own."""

    def takes(self, grid: Grid) -> bool:
        """Whether `keep` can hold every number of this grid."""
        ...

    def keep(self, grid: Grid) -> dict[str, Tensor]:
        """As `convert`, from a weight [out, in] whose grid it takes: keeps the stored numbers and scales."""
        ...


Fusion = Literal["norm", "add", "norm_gated", "norm_rotary"]
"""What may be done in one op with a product, gain and eps being those of a root mean square norm of x [T, in]:

    norm          (x, gain [in], eps, stored, bias) -> linear(rms_norm(x)) [T, out]
    add           (x, stored, residual [T, out], bias) -> residual + linear(x) [T, out]
    norm_gated    (x, gain, eps, stored, bias) -> silu_mul(linear(rms_norm(x))) [T, out / 2]
    norm_rotary   (x, gain, eps, stored, cos, sin, positions, slots, cache, bias) -> queries [T, N, D] of
                  rotary_kv_write(linear(rms_norm(x)) cut in q, k, v); only with KV formats that store by that op

bias [out] is None for a layer that has none, and the Facts of one that has state it as the size bias = 1. Ops write to
the cache, and may keep their result in the residual, which their caller gives up; they write to no other input.
"""


@runtime_checkable
class FusingFormat(Protocol):
    """A LinearFormat that also names ops which do more than multiply; what it does not name is done in steps.

    Such an op's reference works in steps of other references, past the kernels that a device has for these. The op is
    therefore used only where a provider serves it (KernelTable.find), and `--kernel OP=reference` asks for the steps.
    """

    @property
    def fused(self) -> Mapping[Fusion, str]: ...


@dataclass(frozen=True, slots=True)
class KVShape:
    """One layer's cache on this rank: [num_blocks, block_size, num_kv_heads, head_size] for keys and for values."""

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_size: int
