"""The layouts fp8 (DeepSeek, transformers' fine-grained) and fbgemm_fp8: e4m3 weights with scales of blocks or rows.

DeepSeek-V3's scales of 128 x 128 weights are called `weight_scale_inv` (arXiv 2412.19437, section 3.3), and yet weights
are multiplied by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from plexor.api import CheckpointError, TensorSource
from plexor_quant.stored.matrix import Matrix
from plexor_quant.stored.scheme import Inputs, Scheme, static_scale
from plexor_quant.stored.source import E4M3, FLOATS, Blocks, Layer, RoundedSource, companion, expect, sizes_of

METHODS = ("fp8", "fbgemm_fp8")
_UNUSED = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale")


def recognises(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") in METHODS


def precision(quantization: Mapping[str, Any]) -> str:
    """The one with scales of blocks, or of rows; layers with a static scale of their inputs are kept with it."""
    return "fp8_block" if quantization.get("weight_block_size") is not None else "fp8"


def _is_static(quantization: Mapping[str, Any]) -> bool:
    """Inputs in blocks always get their scales while running."""
    return quantization.get("activation_scheme") == "static" and quantization.get("weight_block_size") is None


def open_source(source: TensorSource, quantization: Mapping[str, Any]) -> TensorSource:
    """Shows dense weights; CheckpointError where scales are missing or do not fit."""
    block = quantization.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise CheckpointError(
            f"quantization_config of config.json has weight_block_size {block!r}, where two sizes are due: download "
            "the file again"
        )
    is_static = _is_static(quantization)
    names = frozenset(source.names())
    layers: dict[str, Layer] = {}
    hidden = {name for name in names if name.rpartition(".")[2] in _UNUSED}
    for name in source.names():
        if name.endswith(".weight") and source.info(name).dtype == E4M3:
            inverse = f"{name}_scale_inv"
            scale = inverse if block is not None or inverse in names else f"{name}_scale"
            companion(source, names, name, scale)
            layers[name] = matrix(
                source, names, name, scale, None if block is None else (block[0], block[1]), is_static
            )
            hidden.add(scale)
    return RoundedSource(source, layers, frozenset(hidden))


def matrix(
    source: TensorSource,
    names: frozenset[str],
    name: str,
    scale: str,
    block: tuple[int, int] | None,
    is_static: bool,
) -> Matrix:
    """The layer of an e4m3 weight; without a block its scale is one number, or one for each row.

    is_static: whether "input_scale" beside it holds the one scale of all inputs.
    """
    sizes = sizes_of(source, name)
    expect(source, name, sizes, (E4M3,))
    if block is None:
        block = sizes if source.info(scale).shape in ((), (1,), (1, 1)) else (1, sizes[1])
    blocks = Blocks(source, scale, sizes, block)
    blocks.check((*FLOATS, torch.float8_e8m0fnu))
    static = static_scale(source, names, f"{name.removesuffix('weight')}input_scale") if is_static else None
    return Matrix(source, name, sizes, Scheme(E4M3, 8, block, Inputs("float8", static)), blocks)
