"""The layout of ModelOpt's checkpoints: e4m3 weights, or 4-bit ones in groups, with the scales of their inputs.

4-bit numbers of two output features share a byte of "weight" uint8 [out / 2, in], the even one in the low half, in
two's complement; "weight_scale" [out, in / group] scales them. "pre_quant_scale" [in] multiplies the inputs of a layer
where AWQ's scales could not be folded into the one before. "weight_scale_2" is for kernels that round scaled weights to
e4m3 once more, and is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plexor.api import CheckpointError, TensorSource
from plexor_quant.stored.float8 import matrix
from plexor_quant.stored.scheme import INT4_GROUPS, Inputs, Scheme, static_scale
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
    sizes_of,
    span,
)

PRECISIONS: Mapping[str, str] = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "W4A8_AWQ": "w4a_fp8",
    "W4A16_AWQ": "int4_wo",
}
_UNUSED = ("input_scale", "k_scale", "v_scale", "weight_scale_2")


def recognises(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "modelopt"


def precision(quantization: Mapping[str, Any]) -> str:
    """The one of the algorithm, and of its groups."""
    name = PRECISIONS.get(str(quantization.get("quant_algo")), "dense")
    return INT4_GROUPS.get(_group_size(quantization), name) if name == "int4_wo" else name


def open_source(source: TensorSource, quantization: Mapping[str, Any]) -> TensorSource:
    """Shows dense weights; CheckpointError for algorithms that are not read."""
    algorithm = quantization.get("quant_algo")
    if algorithm not in PRECISIONS:
        raise CheckpointError(
            f"the weights are stored by ModelOpt with the algorithm {algorithm!r}, of which {', '.join(PRECISIONS)} "
            "are read: use a checkpoint made with one of these"
        )
    names = frozenset(source.names())
    layers: dict[str, Layer] = {}
    hidden = {name for name in names if name.rpartition(".")[2] in _UNUSED}
    for name in source.names():
        if not name.endswith(".weight") or source.info(name).dtype not in (E4M3, torch.uint8):
            continue
        scale = companion(source, names, name, f"{name}_scale")
        if source.info(name).dtype == E4M3:
            layers[name] = matrix(source, names, name, scale, None, algorithm == "FP8")
        else:
            layers[name] = _packed(source, names, name, quantization)
        hidden |= {scale, _factor_of(name)}
    return RoundedSource(source, layers, frozenset(hidden))


def _group_size(quantization: Mapping[str, Any]) -> int:
    given = quantization.get("group_size", 128)
    return given if isinstance(given, int) else 0


def _factor_of(name: str) -> str:
    return f"{name.removesuffix('weight')}pre_quant_scale"


@dataclass(frozen=True, slots=True)
class _Packed:
    """A Layer of "weight" uint8 [out / 2, in]; factor: the name of "pre_quant_scale" where there is one."""

    source: TensorSource
    name: str
    shape: tuple[int, int]
    scheme: Scheme
    scale: Blocks
    factor: str | None

    def codes(self, rows: range, columns: range) -> Codes:
        pairs = slice(rows.start // 2, -(-rows.stop // 2))
        packed = self.source.read(self.name, (pairs, span(columns)))
        numbers = packed.new_empty(len(packed), 2, len(columns), dtype=torch.int8)
        # The half that is wanted goes to the top of its byte, and down again with its sign.
        torch.bitwise_right_shift((packed << 4).view(torch.int8), 4, out=numbers[:, 0])
        torch.bitwise_right_shift(packed.view(torch.int8), 4, out=numbers[:, 1])
        start = rows.start - 2 * pairs.start
        wanted = numbers.flatten(0, 1)[start : start + len(rows)]
        size = self.scale.block[1]
        scale = self.scale.scale(rows, columns)
        return Codes(wanted, scale, None, size, columns.start % size, factor=self._factor(columns))

    def _factor(self, columns: range) -> Tensor | None:
        if self.factor is None:
            return None
        factor = self.source.read(self.factor, (span(columns),)).float()
        if not bool((factor.isfinite() & (factor > 0)).all()):
            raise CheckpointError(
                f"tensor {self.factor!r} of {self.source.info(self.factor).file} holds factors of inputs that are NaN, "
                "infinite, negative or zero: the weights are unusable, download the file again"
            )
        return factor


def _packed(source: TensorSource, names: frozenset[str], name: str, quantization: Mapping[str, Any]) -> Layer:
    pairs, columns = sizes_of(source, name)
    block = group_block(source, name, columns, _group_size(quantization))
    sizes = (2 * pairs, columns)
    scale = Blocks(source, f"{name}_scale", sizes, block)
    scale.check(FLOATS)
    factor = _factor_of(name)
    if factor in names:
        expect(source, factor, (columns,), FLOATS)
    inputs = Inputs()
    if quantization.get("quant_algo") == "W4A8_AWQ":
        inputs = Inputs("float8", static_scale(source, names, f"{name.removesuffix('weight')}input_scale"))
    scheme = Scheme(torch.int8, 4, block, inputs, factored=factor in names)
    return _Packed(source, name, sizes, scheme, scale, factor if factor in names else None)
