"""The layout of ModelOpt's FP8 checkpoints: e4m3 weights with a scale for each tensor or for each output channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plexor.api import CheckpointError, TensorSource
from plexor_quant.stored.float8 import matrix
from plexor_quant.stored.source import E4M3, Layer, RoundedSource, companion

ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_UNUSED = ("input_scale", "k_scale", "v_scale")


def recognises(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "modelopt"


def precision(quantization: Mapping[str, Any]) -> str:
    return "fp8"


def open_source(source: TensorSource, quantization: Mapping[str, Any]) -> TensorSource:
    """Shows dense weights; CheckpointError for algorithms that are not read."""
    algorithm = quantization.get("quant_algo")
    if algorithm not in ALGORITHMS:
        raise CheckpointError(
            f"the weights are stored by ModelOpt with the algorithm {algorithm!r}, of which {' and '.join(ALGORITHMS)} "
            "are read: use a checkpoint made with one of these"
        )
    names = frozenset(source.names())
    layers: dict[str, Layer] = {}
    hidden = {name for name in names if name.rpartition(".")[2] in _UNUSED}
    for name in source.names():
        if name.endswith(".weight") and source.info(name).dtype == E4M3:
            scale = companion(source, names, name, f"{name}_scale")
            layers[name] = matrix(source, name, scale, None)
            hidden.add(scale)
    return RoundedSource(source, layers, frozenset(hidden))
