"""The layout of GPTQ's checkpoints, first and second version: integers packed along the input features.

Method: Frantar et al., "GPTQ" (arXiv 2210.17323); layout: AutoGPTQ and GPTQModel. The first version stores zero points
less one. Some symmetric checkpoints name the first and hold the second; their zero point is known to be the middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from plexor.api import CheckpointError, TensorSource
from plexor_quant.stored.scheme import INT4_GROUPS, Scheme
from plexor_quant.stored.source import (
    FLOATS,
    Codes,
    Layer,
    RoundedSource,
    centred,
    companion,
    expect,
    group_block,
    groups_of,
    is_ordered,
    read_order,
    read_packed,
    scale_of_groups,
    sizes_of,
)

VERSIONS = ("gptq", "gptq_v2")
PACKED_BITS = (4, 8)


def recognises(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "gptq"


def precision(quantization: Mapping[str, Any]) -> str:
    """The one with groups of its size; "dense" for 8 bits in groups."""
    size = quantization.get("group_size", 0)
    if quantization.get("bits") == 4:
        return INT4_GROUPS.get(size, "int4_wo")
    return "int8_wo" if size == -1 and quantization.get("sym", False) else "dense"


def open_source(source: TensorSource, quantization: Mapping[str, Any]) -> TensorSource:
    """Shows dense weights; CheckpointError for versions and widths that are not read."""
    version, bits = quantization.get("checkpoint_format", "gptq"), quantization.get("bits")
    if version not in VERSIONS:
        raise CheckpointError(
            f"the weights are stored in the GPTQ format {version!r}, of which {' and '.join(VERSIONS)} are read: use a "
            "checkpoint in one of these"
        )
    if bits not in PACKED_BITS:
        raise CheckpointError(f"the weights are stored by GPTQ in {bits} bits, of which 4 and 8 are read: use another")
    names = frozenset(source.names())
    layers: dict[str, Layer] = {}
    hidden: set[str] = set()
    for name in source.names():
        module, _, last = name.rpartition(".")
        if last == "qweight":
            layers[f"{module}.weight"] = _layer(source, names, module, quantization)
            hidden |= {f"{module}.{part}" for part in ("qzeros", "scales", "g_idx")}
    return RoundedSource(source, layers, frozenset(hidden))


@dataclass(frozen=True, slots=True)
class _Layer:
    """A Layer of "qweight" int32 [in * bits / 32, out], "scales" [groups, out] and "qzeros" [groups, out * bits / 32].

    zero_added: what is added to stored zero points, None where the zero point is the middle of the codes. order: as
    "g_idx", None where groups are of `size` consecutive input features.
    """

    source: TensorSource
    name: str
    scales: str
    zeros: str
    shape: tuple[int, int]
    scheme: Scheme
    size: int
    zero_added: int | None
    order: str | None

    def codes(self, rows: range, columns: range) -> Codes:
        bits = self.scheme.bits
        numbers = centred(read_packed(self.source, self.name, rows, columns, 0, bits), bits)
        groups = groups_of(columns if self.order is None else range(self.shape[1]), self.size)
        scale = scale_of_groups(self.source, self.scales, groups, rows)
        zero = None
        if self.zero_added is not None:
            stored = read_packed(self.source, self.zeros, groups, rows, 1, bits).T.int()
            # Less than zero, the first version wraps around.
            zero = ((stored + self.zero_added) & ((1 << bits) - 1)) - (1 << (bits - 1))
        if self.order is None:
            return Codes(numbers, scale, zero, self.size, columns.start % self.size)
        group = read_order(self.source, self.order, columns, scale.shape[1])
        return Codes(numbers, scale, zero, self.size, group=group)


def _layer(source: TensorSource, names: frozenset[str], module: str, quantization: Mapping[str, Any]) -> Layer:
    name = f"{module}.qweight"
    bits = int(quantization["bits"])
    words, out = sizes_of(source, name)
    columns = words * 32 // bits
    expect(source, name, (words, out), (torch.int32,))
    given = quantization.get("group_size")
    size = columns if given == -1 else given if isinstance(given, int) else 0
    group_block(source, name, columns, size)
    scales = companion(source, names, name, f"{module}.scales")
    expect(source, scales, (columns // size, out), FLOATS)
    zeros = companion(source, names, name, f"{module}.qzeros")
    expect(source, zeros, (columns // size, -(-out * bits // 32)), (torch.int32,))
    added = int(quantization.get("checkpoint_format", "gptq") == "gptq")
    order = f"{module}.g_idx"
    ordered = order in names and is_ordered(source, order, columns, size)
    zero_added = None if quantization.get("sym", False) else added
    scheme = Scheme(torch.int8, bits, (1, size), zero_points=zero_added is not None, ordered=ordered)
    return _Layer(source, name, scales, zeros, (out, columns), scheme, size, zero_added, order if ordered else None)
