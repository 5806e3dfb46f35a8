"""What plexor-quant offers: three precisions, one cache format, and the ops that multiply them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from plexor import hookimpl
from plexor.api import Facts, Kernel, KVFormat, Op, Precision

_CPU = frozenset({"cpu"})
_CUDA = frozenset({"cuda"})
_BFLOAT16 = frozenset({"bfloat16"})
_FLOATS = frozenset({"float32", "float16", "bfloat16"})
# Sums of up to some thousand products in another order. For bfloat16 also a sum or a weight that a provider rounds to
# bfloat16 once more than the reference does.
_SUMMED: Mapping[str, tuple[float, float]] = {
    "float32": (1e-4, 2e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (1.6e-2, 1.6e-2),
}


@hookimpl
def precisions() -> Iterable[Precision]:
    return (
        Precision(
            name="fp8",
            format="plexor_quant.fp8:Fp8Format",
            summary="e4m3 weights with a scale for each output channel, e4m3 activations with a scale for each token",
            needs="fast with bfloat16 activations from compute capability 8.9 on; elsewhere the exact reference runs",
        ),
        Precision(
            name="int8_sq",
            format="plexor_quant.int8_sq:Int8Format",
            summary="int8 weights with a scale for each output channel, int8 activations with a scale for each token",
            needs="fast from compute capability 8.0 on for sizes in multiples of 8; elsewhere slow but exact",
        ),
        Precision(
            name="w4a_fp8",
            format="plexor_quant.w4a_fp8:W4AFp8Format",
            summary="4-bit weights in groups of 128 with a scale each, e4m3 activations with a scale for each token",
            needs="runs anywhere; a quarter of bfloat16's memory, not yet faster than it",
        ),
    )


@hookimpl
def kv_formats() -> Iterable[KVFormat]:
    return (
        KVFormat(
            name="fp8",
            storage="plexor_quant.kv:fp8_storage",
            summary="keys and values in e4m3, half of bfloat16's memory",
        ),
    )


@hookimpl
def ops() -> Iterable[Op]:
    names = ("fp8_linear", "int8_linear", "w4a_fp8_linear")
    grouped = ("fp8_grouped_linear", "int8_grouped_linear", "w4a_fp8_grouped_linear")
    return tuple(_op(name) for name in names + grouped)


@hookimpl
def kernels() -> Iterable[Kernel]:
    return (
        _kernel("fp8_linear", _CUDA, _BFLOAT16, capability=(8, 9), multiple=16),
        Kernel(
            op="fp8_grouped_linear",
            provider="torch",
            load="plexor_quant.kernels.torch.fp8_grouped_linear:fp8_grouped_linear",
            devices=_CUDA,
            dtypes=_BFLOAT16,
            capability=(9, 0),
            refuses=_refuses_scaled_grouped,
        ),
        _kernel("int8_linear", _CUDA, _FLOATS, capability=(8, 0), multiple=8),
        Kernel(
            op="int8_linear",
            provider="cpu",
            load="plexor_quant.kernels.cpu.int8_linear:int8_linear",
            devices=_CPU,
            dtypes=_FLOATS,
        ),
        _kernel("int8_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
        _kernel("w4a_fp8_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=1),
        _kernel("w4a_fp8_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
    )


def _op(name: str) -> Op:
    return Op(
        name=name,
        reference=f"plexor_quant.kernels.reference.{name}:{name}",
        samples=f"plexor_quant.kernels.samples:{name}",
        tolerance=_SUMMED,
    )


def _kernel(
    op: str, devices: frozenset[str], dtypes: frozenset[str], *, capability: tuple[int, int], multiple: int
) -> Kernel:
    """A product of torch's own that takes input and output features in multiples of `multiple`."""
    return Kernel(
        op=op,
        provider="torch",
        load=f"plexor_quant.kernels.torch.{op}:{op}",
        devices=devices,
        dtypes=dtypes,
        capability=capability,
        refuses=partial(_refuses_sizes, multiple=multiple),
    )


def _refuses_sizes(facts: Facts, multiple: int) -> str | None:
    for axis in ("in_features", "out_features"):
        size = facts.shape.get(axis, 0)
        if size % multiple:
            return f"needs {axis} in multiples of {multiple}, not {size}"
    return None


def _refuses_scaled_grouped(facts: Facts) -> str | None:
    if facts.capability is not None and facts.capability[0] not in (9, 10):
        return "is built for compute capability 9 and 10, this device has {}.{}".format(*facts.capability)
    return _refuses_sizes(facts, 16)
