"""One launch of a linear layer: what it multiplies, and what happens to the product before it is stored.

The fields of Arguments and the numbers of the epilogues are those of linear.cuh.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.tuning import Product

_FUSED = ("linear_add", "norm_gated_linear", "norm_rotary_linear")
BOX = 64
"""Numbers of half precision in the 128 bytes that the copy engine swizzles together."""


class Epilogue(IntEnum):
    """What happens to a product before it is stored."""

    STORE = 0
    ADD = 1
    GATED = 2
    ROTARY = 3


class Arguments(ctypes.Structure):
    """What every kernel of linear layers is given besides its tensor maps."""

    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("entry_stride", ctypes.c_longlong),
        ("y_stride", ctypes.c_longlong),
        ("residual_stride", ctypes.c_longlong),
        ("num_rows", ctypes.c_int),
        ("num_outputs", ctypes.c_int),
        ("num_inputs", ctypes.c_int),
        ("pair", ctypes.c_int),
        ("stages", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm before the product: gain [K], eps."""

    gain: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """Where rotated queries' partners go: tables [P, D / 2], positions and slots [T], the layer's cache."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    cache: LayerCache


@dataclass(frozen=True, slots=True)
class Call:
    """x [T, K], normed or not, times weight [N, K] -> y. pair: distance of the rows that belong together, if any do."""

    x: Tensor
    weight: Tensor
    y: Tensor
    epilogue: Epilogue
    arguments: Arguments
    norm: Norm | None = None
    pair: int | None = None
    narrow: bool = False

    @property
    def num_rows(self) -> int:
        return self.x.shape[0]

    @property
    def product(self) -> Product:
        """The op that is served, and its sizes."""
        num_outputs, num_inputs = self.weight.shape
        names = ("linear" if self.norm is None else "norm_linear", *_FUSED)
        return Product(names[self.epilogue], num_outputs, num_inputs, str(self.weight.dtype).removeprefix("torch."))

    def lies_well(self) -> bool:
        """Whether the copy engine can take x and weight as they lie."""
        x, weight = self.x, self.weight
        return (
            x.dtype in (torch.bfloat16, torch.float16)
            and weight.dtype == x.dtype
            and weight.is_contiguous()
            and weight.shape[1] % BOX == 0
            and x.stride(1) == 1
            and x.stride(0) % 8 == x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        )


def product_call(x: Tensor, weight: Tensor, norm: Norm | None = None, bias: Tensor | None = None) -> Call:
    """y [T, N] is the product."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    return Call(x, weight, y, Epilogue.STORE, _arguments(y, bias), norm)


def added_call(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None) -> Call:
    """y [T, N] is residual [T, N], whose features are adjacent, and the product."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    arguments = _arguments(y, bias)
    arguments.residual, arguments.residual_stride = residual.data_ptr(), residual.stride(0)
    return Call(x, weight, y, Epilogue.ADD, arguments)


def gated_call(x: Tensor, weight: Tensor, norm: Norm, bias: Tensor | None) -> Call:
    """y [T, N / 2] is silu(first half) * second half of the product."""
    half = weight.shape[0] // 2
    y = x.new_empty(x.shape[0], half)
    return Call(x, weight, y, Epilogue.GATED, _arguments(y, bias), norm, half)


def rotated_call(x: Tensor, weight: Tensor, norm: Norm, bias: Tensor | None, rotation: Rotation) -> Call | None:
    """y [T, N, D] are the product's queries, turned; turned keys and values go into the cache. None for a cache or a
    rotation that no kernel here takes: parts of heads, other dtypes, entries that do not lie one after the other.
    """
    keys, values = rotation.cache["keys"], rotation.cache["values"]
    num_kv_heads, size = keys.shape[2:]
    narrow = keys.dtype == torch.float8_e4m3fn
    if (
        rotation.cos.shape[1] * 2 != size
        or not (narrow or keys.dtype == x.dtype)
        or keys.stride() != values.stride()
        or keys.stride()[2:] != (size, 1)
        or keys.stride(0) != keys.shape[1] * keys.stride(1)
    ):
        return None
    num_heads = weight.shape[0] // size - 2 * num_kv_heads
    y = x.new_empty(x.shape[0], num_heads, size)
    arguments = _arguments(y, bias)
    arguments.cos, arguments.sin = rotation.cos.data_ptr(), rotation.sin.data_ptr()
    arguments.positions, arguments.slots = rotation.positions.data_ptr(), rotation.slots.data_ptr()
    arguments.keys, arguments.values, arguments.entry_stride = keys.data_ptr(), values.data_ptr(), keys.stride(1)
    arguments.num_heads, arguments.num_kv_heads = num_heads, num_kv_heads
    return Call(x, weight, y, Epilogue.ROTARY, arguments, norm, size // 2, narrow)


def num_multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _arguments(y: Tensor, bias: Tensor | None) -> Arguments:
    return Arguments(y=y.data_ptr(), y_stride=y.stride(0), bias=None if bias is None else bias.data_ptr())
