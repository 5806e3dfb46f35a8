"""The layout of the library compressed-tensors: e4m3, int8 and packed integer weights with scales of several shapes.

The layout is that of https://github.com/vllm-project/compressed-tensors. Scales of a cache (`k_scale`, `v_scale`) are
not used. Static scales of inputs with a zero point are not either: tokens then get their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from plexor.api import CheckpointError, TensorSource
from plexor_quant.stored.matrix import Matrix
from plexor_quant.stored.scheme import INT4_GROUPS, Inputs, Scheme, static_scale
from plexor_quant.stored.source import (
    E4M3,
    FLOATS,
    Blocks,
    Codes,
    Layer,
    RoundedSource,
    centred,
    companion,
    expect,
    group_block,
    is_ordered,
    read_order,
    read_packed,
    sizes_of,
)
from plexor_quant.stored.sparse24 import PRECISIONS, BitmaskSource, is_sparse

FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")
PACKED_BITS = (4, 8)
WHOLE_ROWS = ("channel", "tensor")
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "q_scale")


def recognises(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "compressed-tensors"


def precision(quantization: Mapping[str, Any]) -> str:
    """That of the first group of layers which any keeps as they are stored; the others are kept in theirs beside it."""
    chosen = [_precision_of(group) for group in _groups(quantization)]
    name = next((name for name in chosen if name != "dense"), "dense")
    return PRECISIONS.get(name, name) if is_sparse(quantization) else name


def open_source(source: TensorSource, quantization: Mapping[str, Any]) -> TensorSource:
    """Shows dense weights; CheckpointError for formats that are not read and for tensors that contradict the config."""
    groups = _groups(quantization)
    _check_formats(quantization, groups)
    if is_sparse(quantization):
        source = BitmaskSource(source)
        if not groups:
            return source
    names = frozenset(source.names())
    layers: dict[str, Layer] = {}
    hidden: set[str] = {name for name in names if name.rpartition(".")[2] in _UNUSED}
    for name in source.names():
        module, _, last = name.rpartition(".")
        if last == "weight_packed":
            layers[f"{module}.weight"] = _packed(source, names, module, _group_of(module, groups))
        elif last == "weight" and (f"{module}.weight_scale" in names or source.info(name).dtype in (E4M3, torch.int8)):
            layers[name] = _matrix(source, names, module, _group_of(module, groups))
        else:
            continue
        hidden |= {f"{module}.weight_{part}" for part in ("scale", "zero_point", "shape", "g_idx")}
    return RoundedSource(source, layers, frozenset(hidden))


def _groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    given = quantization.get("config_groups")
    groups = list(given.values()) if isinstance(given, Mapping) else []
    if not groups and is_sparse(quantization):
        return []
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
    """By the numbers of weights and inputs; layers with more of their own (zero points, ...) are kept with it."""
    weights, inputs = group["weights"], _inputs_of(group)
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if (kind, bits) == ("float", 8) and inputs == "float8":
        return "fp8" if strategy in WHOLE_ROWS else "fp8_block"
    if (kind, bits) == ("int", 4) and inputs != "int8":
        size = -1 if strategy in WHOLE_ROWS else weights.get("group_size")
        return "w4a_fp8" if inputs == "float8" else INT4_GROUPS.get(size, "int4_wo")
    if (kind, bits) == ("int", 8) and strategy in WHOLE_ROWS and weights.get("symmetric", True):
        return {"int8": "int8_sq", "as they are": "int8_wo"}.get(inputs, "dense")
    return "dense"


def _inputs_of(group: Mapping[str, Any]) -> Literal["float8", "int8", "as they are", "other"]:
    inputs = group.get("input_activations")
    if not isinstance(inputs, Mapping):
        return "as they are"
    if inputs.get("num_bits") != 8:
        return "other"
    return "float8" if inputs.get("type") == "float" else "int8"


def _is_static(group: Mapping[str, Any]) -> bool:
    """Whether one scale serves all inputs, without a zero point."""
    inputs = group.get("input_activations")
    return isinstance(inputs, Mapping) and inputs.get("dynamic") is False and inputs.get("symmetric", True) is True


def _group_of(module: str, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The group that aims at a module by name or pattern, else the first that aims at a class of modules."""
    for group in groups:
        targets = [target for target in group.get("targets", ()) if isinstance(target, str)]
        patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
        if module in targets or any(_matches(pattern, module) for pattern in patterns):
            return group
    classes = [group for group in groups if any("." not in str(target) for target in group.get("targets", ()))]
    return (classes or groups)[0]


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise CheckpointError(
            f"quantization_config of config.json aims at layers by {pattern!r}, which is no regular expression "
            f"({error}): download the file again"
        ) from error


def _scheme(
    source: TensorSource,
    names: frozenset[str],
    module: str,
    group: Mapping[str, Any],
    dtype: torch.dtype,
    block: tuple[int, int],
    zero_points: bool = False,
    ordered: bool = False,
) -> Scheme:
    bits = int(group["weights"].get("num_bits", 8)) if dtype == torch.int8 else 8
    static = static_scale(source, names, f"{module}.input_scale") if _is_static(group) else None
    return Scheme(dtype, bits, block, Inputs(_inputs_of(group), static), zero_points, ordered)


def _matrix(source: TensorSource, names: frozenset[str], module: str, group: Mapping[str, Any]) -> Layer:
    name = f"{module}.weight"
    sizes = sizes_of(source, name)
    stored = source.info(name).dtype
    expect(source, name, sizes, (E4M3, torch.int8))
    scale_name = companion(source, names, name, f"{module}.weight_scale")
    block = _block(source, name, scale_name, sizes, group)
    scale = Blocks(source, scale_name, sizes, block)
    scale.check(FLOATS)
    zero_point = None
    if f"{module}.weight_zero_point" in names and stored == torch.int8 and not group["weights"].get("symmetric", True):
        zero_point = Blocks(source, f"{module}.weight_zero_point", sizes, block)
        zero_point.check((torch.int8, torch.int32))
    scheme = _scheme(source, names, module, group, stored, block, zero_points=zero_point is not None)
    if isinstance(source, BitmaskSource) and source.is_kept(name):
        scheme = replace(scheme, sparse=True)
    return Matrix(source, name, sizes, scheme, scale, zero_point)


def _block(
    source: TensorSource, name: str, scale: str, sizes: tuple[int, int], group: Mapping[str, Any]
) -> tuple[int, int]:
    """Rows and columns that share a scale, told by the shape of the scales and, for groups and blocks, the config."""
    shape = source.info(scale).shape
    rows, columns = sizes
    if shape in ((), (1,), (1, 1)):
        return rows, columns
    if shape in ((rows,), (rows, 1)):
        return 1, columns
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
    scheme: Scheme
    scale: Blocks
    zero_point: str | None
    order: str | None

    def codes(self, rows: range, columns: range) -> Codes:
        bits = self.scheme.bits
        numbers = centred(read_packed(self.source, self.name, rows, columns, 1, bits), bits)
        size = self.scale.block[1]
        touched = columns if self.order is None else range(self.shape[1])
        scale = self.scale.scale(rows, touched)
        zero_point = None
        if self.zero_point is not None:
            groups = range(touched.start // size, -(-touched.stop // size))
            stored = read_packed(self.source, self.zero_point, groups, rows, 0, bits)
            zero_point = centred(stored, bits).T.int()
        if self.order is None:
            return Codes(numbers, scale, zero_point, size, columns.start % size)
        group = read_order(self.source, self.order, columns, scale.shape[1])
        return Codes(numbers, scale, zero_point, size, group=group)


def _packed(source: TensorSource, names: frozenset[str], module: str, group: Mapping[str, Any]) -> Layer:
    name = f"{module}.weight_packed"
    rows, words = sizes_of(source, name)
    shape_name = companion(source, names, name, f"{module}.weight_shape")
    expect(source, shape_name, (2,), (torch.int64, torch.int32))
    out, columns = (int(size) for size in source.read(shape_name).tolist())
    bits = int(group["weights"].get("num_bits", 0))
    if out != rows or bits not in PACKED_BITS or -(-columns * bits // 32) != words or columns < 1:
        raise CheckpointError(
            f"tensor {name!r} of {source.info(name).file} is [{rows}, {words}], which does not hold [{out}, {columns}] "
            f"numbers of {bits} bits; only {' and '.join(map(str, PACKED_BITS))} bits are read: use another checkpoint"
        )
    expect(source, name, (rows, words), (torch.int32,))
    scale_name = companion(source, names, name, f"{module}.weight_scale")
    sizes = (rows, columns)
    block = _block(source, name, scale_name, sizes, group)
    scale = Blocks(source, scale_name, sizes, block)
    scale.check(FLOATS)
    zero_point = f"{module}.weight_zero_point" if f"{module}.weight_zero_point" in names else None
    if zero_point is not None:
        expect(source, zero_point, (-(-rows * bits // 32), -(-columns // block[1])), (torch.int32,))
    order = f"{module}.weight_g_idx"
    ordered = order in names and is_ordered(source, order, columns, block[1])
    scheme = _scheme(source, names, module, group, torch.int8, block, zero_point is not None, ordered)
    return _Packed(source, name, sizes, scheme, scale, zero_point, order if ordered else None)
