"""The layout of the library compressed-tensors, as `plexor quantize` writes it for vLLM, transformers and Plexor.

The layout is that of https://github.com/vllm-project/compressed-tensors. Codes and scales are written as formats keep
them, so that reading gives the very same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

INT4_PRECISIONS: Mapping[int, str] = {64: "int4_wo_g64", 32: "int4_wo_g32"}
"""Precisions with smaller groups, by size, largest first."""

HEAD = "lm_head"
"""What transformers calls a model's head, whatever it is called in the checkpoint and even if it is not stored."""

BYTES_IN_WORD = 4

Pack = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
"""(what a format keeps of a weight [out, in], in) -> the layout's tensors by last name."""


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """A WrittenFormat. form: the library's name for the layout of one weight; group_size: None for a scale for a row.

    inputs: type of the activations, rounded to 8 bits for each token; None where they stay as they are.
    """

    form: str
    type: str
    bits: int
    pack: Pack
    group_size: int | None = None
    inputs: str | None = None

    def refuses(self, in_features: int) -> str | None:
        size = self.group_size
        if size is None or in_features % size == 0:
            return None
        fitting = [name for smaller, name in INT4_PRECISIONS.items() if smaller < size and in_features % smaller == 0]
        choice = f"{fitting[0]} or another precision" if fitting else "a precision with a scale for each channel"
        return (
            f"has {in_features} input features, which groups of {size} do not divide, as checkpoints in the layout of "
            f"compressed-tensors must: choose {choice}, or leave such layers out with --dense"
        )

    def tensors(self, stored: Mapping[str, Tensor], in_features: int) -> dict[str, Tensor]:
        return self.pack(stored, in_features)

    def quantization(self, ignored: Sequence[str]) -> dict[str, Any]:
        group = {
            "targets": ["Linear"],
            "weights": self._weights(),
            "input_activations": None if self.inputs is None else _per_token(self.inputs),
            "output_activations": None,
            "format": self.form,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(dict.fromkeys((*ignored, HEAD))),
            "kv_cache_scheme": None,
        }

    def _weights(self) -> dict[str, Any]:
        strategy = "channel" if self.group_size is None else "group"
        return {
            "type": self.type,
            "num_bits": self.bits,
            "symmetric": True,
            "strategy": strategy,
            "group_size": self.group_size,
            "dynamic": False,
        }


def fp8() -> CompressedTensors:
    return CompressedTensors("float-quantized", "float", 8, _plain, inputs="float")


def int8_sq() -> CompressedTensors:
    return CompressedTensors("int-quantized", "int", 8, _plain, inputs="int")


def w4a_fp8() -> CompressedTensors:
    return CompressedTensors("pack-quantized", "int", 4, _nibbles, group_size=128, inputs="float")


def int8_wo() -> CompressedTensors:
    return CompressedTensors("pack-quantized", "int", 8, _bytes)


def int4_wo() -> CompressedTensors:
    return _int4(128)


def int4_wo_g64() -> CompressedTensors:
    return _int4(64)


def int4_wo_g32() -> CompressedTensors:
    return _int4(32)


def int4_wo_channel() -> CompressedTensors:
    return _int4(None)


def _int4(group_size: int | None) -> CompressedTensors:
    return CompressedTensors("pack-quantized", "int", 4, _nibbles, group_size=group_size)


def _per_token(type: str) -> dict[str, Any]:
    return {"type": type, "num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


def _plain(stored: Mapping[str, Tensor], in_features: int) -> dict[str, Tensor]:
    return {"weight": stored["weight"], "weight_scale": stored["scale"].unsqueeze(-1)}


def _bytes(stored: Mapping[str, Tensor], in_features: int) -> dict[str, Tensor]:
    """int8 plus 128, four to a word."""
    return _packed((stored["weight"] ^ -128).view(torch.uint8), stored["scale"].unsqueeze(-1), in_features)


def _nibbles(stored: Mapping[str, Tensor], in_features: int) -> dict[str, Tensor]:
    """Formats keep nibbles as the layout wants them: plus 8, the first in the lowest bits, zeros behind the last."""
    return _packed(stored["weight"], stored["scale"], in_features)


def _packed(codes: Tensor, scale: Tensor, in_features: int) -> dict[str, Tensor]:
    padded = functional.pad(codes, (0, -codes.shape[1] % BYTES_IN_WORD))
    return {
        "weight_packed": padded.contiguous().view(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor([codes.shape[0], in_features]),
    }
