"""Attention of one-row sequences whose partial results meet in shared memory: the blocks of a cluster share a KV head.

The kernel, its picture and its terms are in decode_attention.cu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from cuda.bindings import driver
from torch import Tensor

from plexor.batch import LayerCache
from plexor.kernels.cuda.attention_choice import HEAD_SIZES, MOST_GROUP, Cut, cut_for
from plexor.kernels.cuda.program import LINEAR_HEADER, Program, checked, load_program
from plexor.kernels.triton.attention import LOG2_E

STORAGES = {torch.float8_e4m3fn: 1, torch.int8: 2}
"""Numbers of the storages in the kernel; any other is that of the queries, 0."""


class Decodes(ctypes.Structure):
    """What the kernel is given; the fields are those of decode_attention.cu."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("kv_length", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("q_row_stride", ctypes.c_longlong),
        ("q_head_stride", ctypes.c_longlong),
        ("out_row_stride", ctypes.c_longlong),
        ("table_stride", ctypes.c_longlong),
        ("entry_stride", ctypes.c_int),
        ("num_rows", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int),
        ("num_shifts", ctypes.c_int),
        ("window", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
    )


class DecodeAttention:
    """The attention of one-row sequences for one layer."""

    def __init__(self, choose: Callable[[int, int, int], Cut] = cut_for) -> None:
        self._choose = choose

    def __call__(
        self,
        q: Tensor,
        cache: LayerCache,
        block_table: Tensor,
        kv_length: Tensor,
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """As plexor.kernels.triton.decode_attention.DecodeAttention, for what `serves` says yes to."""
        num_rows, num_heads, head_size = q.shape
        keys, values = cache["keys"], cache["values"]
        block_size, num_kv_heads = keys.shape[1:3]
        entry_bytes = head_size * keys.element_size()
        cut = self._choose(num_rows, num_kv_heads, entry_bytes)
        arguments = Decodes(
            q=q.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            block_table=block_table.data_ptr(),
            kv_length=kv_length.data_ptr(),
            out=out.data_ptr(),
            q_row_stride=q.stride(0),
            q_head_stride=q.stride(1),
            out_row_stride=out.stride(0),
            table_stride=block_table.stride(0),
            entry_stride=keys.stride(1) * keys.element_size(),
            num_rows=num_rows,
            num_kv_heads=num_kv_heads,
            num_shifts=cut.shifts,
            window=0 if window is None else window,
            scale_log2=scale * LOG2_E,
        )
        if "key_scales" in cache:
            arguments.key_scales, arguments.value_scales = (cache[name].data_ptr() for name in _SCALES)
        program = compiled(
            torch.cuda.current_device(),
            cut,
            (head_size, num_heads // num_kv_heads, block_size),
            STORAGES.get(keys.dtype, 0),
            q.dtype == torch.float16,
            window is not None,
        )
        program.launch(cut.cluster * num_kv_heads * cut.shifts, (arguments,))


_SCALES = ("key_scales", "value_scales")


@cache
def compiled(device: int, cut: Cut, sizes: tuple[int, int, int], storage: int, half: bool, windowed: bool) -> Program:
    """The kernel for heads of these sizes (features, query heads of a KV head, entries of a block) on this device."""
    head_size, group, block_size = sizes
    defines: dict[str, int | str] = {
        "HEAD_SIZE": head_size,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "STORAGE": storage,
        "HALF": half,
        "WINDOWED": windowed,
        "SUB": cut.spread,
        "WARPS": cut.warps,
        "CLUSTER": cut.cluster,
        "REGISTERS": cut.registers,
    }
    sources = (LINEAR_HEADER, Path(__file__).with_name("decode_attention.cu"))
    program = load_program(sources, defines, 32 * cut.warps, cut.shared_bytes(head_size, group), cut.cluster)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    checked(driver.cuFuncSetAttribute(program.function, attribute, 1))
    return program


def serves(q: Tensor, cache: LayerCache) -> bool:
    """Whether the kernel can read these queries [S, N, D] and this cache as they lie."""
    keys, values = cache["keys"], cache["values"]
    block_size, num_kv_heads, head_size = keys.shape[1:]
    scaled = "key_scales" in cache
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and (keys.dtype == torch.int8 if scaled else keys.dtype in (q.dtype, torch.float8_e4m3fn))
        and head_size in HEAD_SIZES
        and q.shape[1] // num_kv_heads <= MOST_GROUP
        and block_size % 16 == 0
        and keys.stride() == values.stride()
        and keys.stride()[2:] == (head_size, 1)
        and keys.stride(0) == block_size * keys.stride(1)
        and all(cache[name].is_contiguous() for name in _SCALES if scaled)
        and q.stride(2) == 1
        and q.stride(0) % 8 == q.stride(1) % 8 == q.data_ptr() % 16 == 0
        and keys.data_ptr() % 16 == values.data_ptr() % 16 == keys.stride(1) * keys.element_size() % 16 == 0
    )
