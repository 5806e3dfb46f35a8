"""The layout of AutoAWQ's checkpoints, version gemm: 4-bit integers packed along the output features in a fixed order.

Method: Lin et al., "AWQ" (arXiv 2306.00978). In a word the numbers of eight output features lie like this:

    bits   31..28  27..24  23..20  19..16  15..12  11..8   7..4   3..0
    feature     7       5       3       1       6      4      2      0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    scale_of_groups,
    sizes_of,
    some_rows,
    unpacked,
)

SLOT_OF_FEATURE = (0, 4, 1, 5, 2, 6, 3, 7)


def recognises(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "awq"


def precision(quantization: Mapping[str, Any]) -> str:
    """The one with groups of its size; layers are kept in such with zero points."""
    return INT4_GROUPS.get(_group_size(quantization), "int4_wo")


def open_source(source: TensorSource, quantization: Mapping[str, Any]) -> TensorSource:
    """Shows dense weights; CheckpointError for versions and widths that are not read."""
    version = str(quantization.get("version", "gemm")).lower()
    bits = quantization.get("bits", quantization.get("w_bit"))
    zero_point = quantization.get("zero_point", True)
    if version != "gemm" or bits != 4 or zero_point is not True:
        raise CheckpointError(
            f"the weights are stored by AWQ in the version {version!r} with {bits} bits and zero_point {zero_point!r}, "
            "of which 'gemm' with 4 bits and zero points is read: use a checkpoint of that version"
        )
    names = frozenset(source.names())
    layers: dict[str, Layer] = {}
    hidden: set[str] = set()
    for name in source.names():
        module, _, last = name.rpartition(".")
        if last == "qweight":
            layers[f"{module}.weight"] = _layer(source, names, module, quantization)
            hidden |= {f"{module}.qzeros", f"{module}.scales"}
    return RoundedSource(source, layers, frozenset(hidden))


def _group_size(quantization: Mapping[str, Any]) -> int:
    given = quantization.get("group_size", quantization.get("q_group_size"))
    return given if isinstance(given, int) else 0


@dataclass(frozen=True, slots=True)
class _Layer:
    """A Layer of "qweight" int32 [in, out / 8], "scales" [groups, out] and "qzeros" int32 [groups, out / 8].

    size: input features of a group.
    """

    source: TensorSource
    name: str
    scales: str
    zeros: str
    shape: tuple[int, int]
    scheme: Scheme
    size: int

    def codes(self, rows: range, columns: range) -> Codes:
        groups = groups_of(columns, self.size)
        scale = scale_of_groups(self.source, self.scales, groups, rows)
        zero = self._numbers(self.zeros, groups, rows).int()
        return Codes(self._numbers(self.name, columns, rows), scale, zero, self.size, columns.start % self.size)

    def _numbers(self, name: str, lines: range, rows: range) -> Tensor:
        """int8 [rows, lines] from -8 to 7 of a tensor [lines, out / 8]."""
        words = slice(rows.start // 8, -(-rows.stop // 8))
        stored = self.source.read(name, (slice(lines.start, lines.stop), words))
        features = torch.empty(stored.shape[1], 8, len(lines), dtype=torch.uint8, device=stored.device)
        for some in some_rows(stored.shape[1], 8 * len(lines)):
            slots = unpacked(stored[:, some], 4).reshape(len(lines), -1, 8)
            for feature, slot in enumerate(SLOT_OF_FEATURE):
                features[some, feature] = slots[:, :, slot].T
        start = rows.start - words.start * 8
        return centred(features.flatten(0, 1)[start : start + len(rows)], 4)


def _layer(source: TensorSource, names: frozenset[str], module: str, quantization: Mapping[str, Any]) -> Layer:
    name = f"{module}.qweight"
    columns, words = sizes_of(source, name)
    expect(source, name, (columns, words), (torch.int32,))
    given = _group_size(quantization)
    size = columns if given == -1 else given
    group_block(source, name, columns, size)
    scales = companion(source, names, name, f"{module}.scales")
    expect(source, scales, (columns // size, words * 8), FLOATS)
    zeros = companion(source, names, name, f"{module}.qzeros")
    expect(source, zeros, (columns // size, words), (torch.int32,))
    scheme = Scheme(torch.int8, 4, (1, size), zero_points=True)
    return _Layer(source, name, scales, zeros, (words * 8, columns), scheme, size)
