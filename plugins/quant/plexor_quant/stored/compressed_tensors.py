"""The layout of the library compressed-tensors: e4m3, int8 and packed integer weights with scales of several shapes.

The layout is that of https://github.com/vllm-project/compressed-tensors. Activations are rounded by the precision that
runs, for each token: static scales (`input_scale`) and those of a cache (`k_scale`, `v_scale`) are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from plexor.api import CheckpointError, TensorSource
from plexor_quant.stored.matrix import Matrix
from plexor_quant.stored.source import (
    E4M3,
    FLOATS,
    Blocks,
    Codes,
    Layer,
    RoundedSource,
    companion,
    expect,
    group_block,
    read_order,
    read_packed,
    sizes_of,
)

FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")
PACKED_BITS = (4, 8)
INT4_GROUPS: Mapping[int, str] = {32: "int4_wo_g32", 64: "int4_wo_g64", 128: "int4_wo"}
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "q_scale")


def recognises(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "compressed-tensors"


def precision(quantization: Mapping[str, Any]) -> str:
    """The one that keeps every group of layers as it is stored; "dense" where they differ or none does."""
    chosen = {_precision_of(group) for group in _groups(quantization)}
    return chosen.pop() if len(chosen) == 1 else "dense"


def open_source(source: TensorSource, quantization: Mapping[str, Any]) -> TensorSource:
    """Shows dense weights; CheckpointError for formats that are not read and for tensors that contradict the config."""
    groups = _groups(quantization)
    _check_formats(quantization, groups)
    names = frozenset(source.names())
    layers: dict[str, Layer] = {}
    hidden: set[str] = {name for name in names if name.rpartition(".")[2] in _UNUSED}
    for name in source.names():
        module, _, last = name.rpartition(".")
        if last == "weight_packed":
            layers[f"{module}.weight"] = _packed(source, names, module, groups)
        elif last == "weight" and (f"{module}.weight_scale" in names or source.info(name).dtype in (E4M3, torch.int8)):
            layers[name] = _matrix(source, names, module, groups)
        else:
            continue
        hidden |= {f"{module}.weight_{part}" for part in ("scale", "zero_point", "shape", "g_idx")}
    return RoundedSource(source, layers, frozenset(hidden))


def _groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    given = quantization.get("config_groups")
    groups = list(given.values()) if isinstance(given, Mapping) else []
    if not groups or not all(
        isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping) for group in groups
    ):
        raise CheckpointError(
            "quantization_config of config.json describes no weights in config_groups: download the file again"
        )
    return groups


def _check_formats(quantization: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> None:
    given = [quantization.get("format"), *(group.get("format") for group in groups)]
    for name in given:
        if name is not None and name not in (*FORMATS, "mixed-precision"):
            raise CheckpointError(
                f"the weights are stored in the compressed-tensors format {name!r}, of which {', '.join(FORMATS)} are "
                "read: use a checkpoint in one of these"
            )


def _precision_of(group: Mapping[str, Any]) -> str:
    weights, inputs = group["weights"], group.get("input_activations")
    symmetric, strategy, size = weights.get("symmetric", True), weights.get("strategy"), weights.get("group_size")
    if not symmetric or weights.get("actorder") in ("group", "dynamic", True):
        return "dense"
    rounded_inputs = None if inputs is None else (inputs.get("type"), inputs.get("num_bits"))
    key = weights.get("type"), weights.get("num_bits"), rounded_inputs
    if strategy in ("channel", "tensor"):
        kept = {
            ("float", 8, ("float", 8)): "fp8",
            ("int", 8, ("int", 8)): "int8_sq",
            ("int", 8, None): "int8_wo",
            ("int", 4, None): "int4_wo_channel",
        }
        return kept.get(key, "dense")
    if key == ("int", 4, ("float", 8)) and size == 128:
        return "w4a_fp8"
    return INT4_GROUPS.get(size, "dense") if key == ("int", 4, None) else "dense"


def _matrix(source: TensorSource, names: frozenset[str], module: str, groups: list[Mapping[str, Any]]) -> Layer:
    name = f"{module}.weight"
    sizes = sizes_of(source, name)
    stored = source.info(name).dtype
    expect(source, name, sizes, (E4M3, torch.int8))
    scale_name = companion(source, names, name, f"{module}.weight_scale")
    block = _block(source, name, scale_name, sizes, groups)
    scale = Blocks(source, scale_name, sizes, block)
    scale.check(FLOATS)
    zero_point = None
    if f"{module}.weight_zero_point" in names and stored == torch.int8:
        zero_point = Blocks(source, f"{module}.weight_zero_point", sizes, block)
        zero_point.check((torch.int8, torch.int32))
    bits = max(int(group["weights"].get("num_bits", 8)) for group in groups) if stored == torch.int8 else 8
    return Matrix(source, name, sizes, stored, bits, scale, zero_point)


def _block(
    source: TensorSource, name: str, scale: str, sizes: tuple[int, int], groups: list[Mapping[str, Any]]
) -> tuple[int, int]:
    """Rows and columns that share a scale, told by the shape of the scales and, for groups and blocks, the config."""
    shape = source.info(scale).shape
    rows, columns = sizes
    if shape in ((), (1,), (1, 1)):
        return rows, columns
    if shape in ((rows,), (rows, 1)):
        return 1, columns
    for group in groups:
        block = group["weights"].get("block_structure")
        if isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block):
            return block[0], block[1]
        size = group["weights"].get("group_size")
        if isinstance(size, int) and size > 0:
            return group_block(source, name, columns, size)
    return 1, columns  # refused by the check of the shape


@dataclass(frozen=True, slots=True)
class _Packed:
    """A Layer of "weight_packed" int32 [out, ceil(in * bits / 32)], its numbers plus 2^(bits - 1), along a row.

    zero_point: a tensor packed in the same way along the rows, [ceil(out * bits / 32), groups]. order: the group of
    each input feature, int32 [in], where groups are not of consecutive features.
    """

    source: TensorSource
    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    scale: Blocks
    zero_point: str | None
    order: str | None

    def codes(self, rows: range, columns: range) -> Codes:
        half = 1 << (self.bits - 1)
        numbers = read_packed(self.source, self.name, rows, columns, 1, self.bits) - half
        size = self.scale.block[1]
        touched = columns if self.order is None else range(self.shape[1])
        scale = self.scale.scale(rows, touched)
        zero_point = None
        if self.zero_point is not None:
            groups = range(touched.start // size, -(-touched.stop // size))
            zero_point = read_packed(self.source, self.zero_point, groups, rows, 0, self.bits).T - half
        if self.order is None:
            return Codes(numbers, scale, zero_point, size, columns.start % size)
        group = read_order(self.source, self.order, columns, scale.shape[1])
        return Codes(numbers, scale[:, group], None if zero_point is None else zero_point[:, group])


def _packed(source: TensorSource, names: frozenset[str], module: str, groups: list[Mapping[str, Any]]) -> Layer:
    name = f"{module}.weight_packed"
    rows, words = sizes_of(source, name)
    shape_name = companion(source, names, name, f"{module}.weight_shape")
    expect(source, shape_name, (2,), (torch.int64, torch.int32))
    out, columns = (int(size) for size in source.read(shape_name).tolist())
    given = {int(group["weights"].get("num_bits", 0)) for group in groups}
    fitting = [bits for bits in given if bits in PACKED_BITS and -(-columns * bits // 32) == words]
    if out != rows or len(fitting) != 1 or columns < 1:
        raise CheckpointError(
            f"tensor {name!r} of {source.info(name).file} is [{rows}, {words}], which does not hold [{out}, {columns}] "
            f"numbers of {' or '.join(str(bits) for bits in sorted(given))} bits; only "
            f"{' and '.join(str(bits) for bits in PACKED_BITS)} bits are read: use another checkpoint"
        )
    bits = fitting[0]
    expect(source, name, (rows, words), (torch.int32,))
    scale_name = companion(source, names, name, f"{module}.weight_scale")
    sizes = (rows, columns)
    scale = Blocks(source, scale_name, sizes, _block(source, name, scale_name, sizes, groups))
    scale.check(FLOATS)
    zero_point = f"{module}.weight_zero_point" if f"{module}.weight_zero_point" in names else None
    if zero_point is not None:
        expect(source, zero_point, (-(-rows * bits // 32), -(-columns // scale.block[1])), (torch.int32,))
    order = f"{module}.weight_g_idx" if f"{module}.weight_g_idx" in names else None
    if order is not None:
        expect(source, order, (columns,), (torch.int32, torch.int64))
    return _Packed(source, name, sizes, torch.int8, bits, scale, zero_point, order)
