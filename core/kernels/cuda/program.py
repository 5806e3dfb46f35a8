"""Compile CUDA C++ for the device at hand, keep the machine code on disk, and launch it so that kernels overlap.

NVRTC and the driver are called through cuda.bindings, which comes with torch's CUDA wheels: unlike CuPy's it compiles
for sm_90a and launches with attributes (programmatic dependent launch).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor

from plexor.config import cache_folder
from plexor.errors import PlexorError


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel that can be launched: threads and bytes of shared memory of each block, blocks of each cluster."""

    function: Any
    threads: int
    shared_bytes: int
    cluster: int = 1

    def launch(self, num_blocks: int, arguments: Sequence[Any]) -> None:
        """Queue it on torch's current stream; it may start while the kernel before it ends, and must wait for that one
        with griddepcontrol.wait before it touches what that one reads or writes.

        arguments: for each parameter an object whose `getPtr()` is its address, or a ctypes structure.
        """
        addresses = (ctypes.c_void_p * len(arguments))(*map(_address, arguments))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = num_blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.attrs = [_overlapping(), _clustered(self.cluster)]
        config.numAttrs = len(config.attrs)
        checked(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(addresses), 0))


LINEAR_HEADER = Path(__file__).with_name("linear.cuh")
"""What the kernels of linear layers share."""

STREAM_HEADER = Path(__file__).with_name("stream.cuh")
"""What those among them share that stream weights past few rows; it comes behind the other."""


def load_program(
    sources: tuple[Path, ...], defines: Mapping[str, int | str], threads: int, shared_bytes: int, cluster: int = 1
) -> Program:
    """A kernel, compiled for the current device with these macros from files that are read one behind the other; the
    last one is named after it.

    All layers of a model that ask for the same get the same: it is read, compiled and loaded once for each device.
    """
    return _load(torch.cuda.current_device(), sources, tuple(defines.items()), threads, shared_bytes, cluster)


@cache
def _load(
    device: int,
    sources: tuple[Path, ...],
    defines: tuple[tuple[str, int], ...],
    threads: int,
    shared_bytes: int,
    cluster: int,
) -> Program:
    """As `load_program`, where `device` is the current one."""
    torch.cuda.current_stream()  # the driver's calls below need torch's context
    macros = "".join(f"#define {key} {value if isinstance(value, str) else int(value)}\n" for key, value in defines)
    source = macros + "".join(path.read_text() for path in sources)
    major, minor = torch.cuda.get_device_capability(device)
    options = (f"--gpu-architecture=sm_{major}{minor}a", "-std=c++17")
    module = checked(driver.cuModuleLoadData(_machine_code(source, options)))
    function = checked(driver.cuModuleGetFunction(module, sources[-1].stem.encode()))
    attribute = driver.CUfunction_attribute
    for key, value in (
        (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes),
        (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        checked(driver.cuFuncSetAttribute(function, key, value))
    return Program(function, threads, shared_bytes, cluster)


def tensor_map(tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """How the copy engine sees a tensor of numbers of one or two bytes: sizes, innermost first; strides, in numbers, of
    all but the innermost.
    """
    kinds, size = driver.CUtensorMapDataType, tensor.element_size()
    assert size in (1, 2)
    return checked(
        driver.cuTensorMapEncodeTiled(
            # They are only copied: any type of their size will do.
            kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8 if size == 1 else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(sizes),
            tensor.data_ptr(),
            [driver.cuuint64_t(extent) for extent in sizes],
            [driver.cuuint64_t(size * stride) for stride in strides],
            [driver.cuuint32_t(extent) for extent in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,  # 256 bytes cost 8 % of the bandwidth
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver or of NVRTC gives besides its status; PlexorError unless that is success."""
    status, *values = result
    if status.value != 0:
        raise PlexorError(
            f"the CUDA driver refused a kernel of Plexor's ({status.name}): choose another provider with --kernel"
        )
    return values[0] if values else None


def _overlapping() -> Any:
    """Programmatic dependent launch."""
    value = driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    return attribute


def _clustered(num_blocks: int) -> Any:
    value = driver.CUlaunchAttributeValue()
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = num_blocks, 1, 1
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value = value
    return attribute


def _address(argument: Any) -> int:
    return ctypes.addressof(argument) if isinstance(argument, ctypes.Structure) else int(argument.getPtr())


def _machine_code(source: str, options: tuple[str, ...]) -> bytes:
    """From the disk if this source has been compiled with these options before."""
    version = nvrtc.nvrtcVersion()[1:]
    key = hashlib.blake2b(repr((source, options, version)).encode(), digest_size=16).hexdigest()
    path = cache_folder() / "kernels" / f"{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    code = _compile(source, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)  # whole or not at all, also with two processes at once
    return code


def _compile(source: str, options: tuple[str, ...]) -> bytes:
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status.value != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise PlexorError(f"NVRTC does not compile a kernel of Plexor's: {log.decode(errors='replace')}")
    code: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    return code
