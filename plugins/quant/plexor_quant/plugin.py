"""What plexor-quant offers: precisions, cache formats, and the ops behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from plexor import hookimpl
from plexor.api import Facts, Kernel, KVFormat, Op, Precision, StoredWeights
from plexor_quant import fusions

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
_STATIC = ("fp8_static", "int8_static", "w4a_fp8_static")
_SPARSE24 = ("sparse24", "sparse24_fp8")
_WRITTEN = frozenset(
    {"fp8", "int8_sq", "w4a_fp8", "int8_wo", "int4_wo", "int4_wo_g64", "int4_wo_g32", "int4_wo_channel"}
)
# Features turned in float32 and rounded to the activation dtype, or scales, which torch divides by 127 in two ways.
_ROUNDED: Mapping[str, tuple[float, float]] = {**_SUMMED, "float32": (1e-5, 1e-5), "float16": (2e-3, 2e-3)}


@hookimpl
def precisions() -> Iterable[Precision]:
    offered: tuple[Precision, ...] = (
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
            needs="fast on compute capability 9.0; runs anywhere, in a quarter of bfloat16's memory",
        ),
        Precision(
            name="int8_wo",
            format="plexor_quant.int8_wo:Int8WeightFormat",
            summary="int8 weights with a scale for each output channel, activations in the model's dtype",
            needs="runs anywhere; half of bfloat16's memory, fast for up to 16 rows on compute capability 9.x",
        ),
        _int4_wo("int4_wo", "Int4WeightFormat", "in groups of 128 with a scale each"),
        _int4_wo("int4_wo_g64", "groups_of_64", "in groups of 64 with a scale each"),
        _int4_wo("int4_wo_g32", "groups_of_32", "in groups of 32 with a scale each"),
        _int4_wo("int4_wo_channel", "whole_rows", "with a scale for each output channel"),
        Precision(
            name="fp8_block",
            format="plexor_quant.fp8_block:Fp8BlockFormat",
            summary="e4m3 weights in groups of 128 or, as stored, blocks with a scale each, e4m3 activations in groups",
            needs="runs anywhere; half of bfloat16's memory",
        ),
        Precision(
            name="sparse24",
            format="plexor_quant.sparse24:Sparse24Format",
            summary="2:4 weights in the model's dtype, for models that were trained so",
            needs="runs anywhere; refuses weights that are not 2:4",
            selective=True,
        ),
        Precision(
            name="sparse24_fp8",
            format="plexor_quant.sparse24:Sparse24Fp8Format",
            summary="2:4 weights in e4m3 with a scale for each output channel, e4m3 activations as in fp8",
            needs="runs anywhere; refuses weights that are not 2:4",
            selective=True,
        ),
    )
    return tuple(_writable(each) if each.name in _WRITTEN else each for each in offered)


@hookimpl
def kv_formats() -> Iterable[KVFormat]:
    return (
        KVFormat(
            name="fp8",
            storage="plexor_quant.kv:fp8_storage",
            summary="keys and values in e4m3, half of bfloat16's memory",
        ),
        KVFormat(
            name="int8",
            storage="plexor_quant.kv:int8_storage",
            summary="keys and values in int8 with a scale for each token and head, about half of bfloat16's memory",
            write="int8_kv_write",
            rotary_write="int8_rotary_kv_write",
            attend="int8_paged_attention",
        ),
    )


@hookimpl
def stored_weights() -> Iterable[StoredWeights]:
    layouts = {
        "AutoAWQ": "awq",
        "compressed-tensors": "compressed_tensors",
        "FP8": "float8",
        "GPTQ": "gptq",
        "ModelOpt": "modelopt",
    }
    return tuple(
        StoredWeights(
            name=name,
            recognises=f"plexor_quant.stored.{module}:recognises",
            open=f"plexor_quant.stored.{module}:open_source",
            precision=f"plexor_quant.stored.{module}:precision",
        )
        for name, module in layouts.items()
    )


@hookimpl
def ops() -> Iterable[Op]:
    formats = ("fp8", "int8", "w4a_fp8", "int8_wo", "int4_wo", "fp8_block", *_STATIC)
    products = tuple(_op(f"{name}_{kind}") for kind in ("linear", "grouped_linear") for name in formats)
    return products + tuple(fusions.ops()) + _sparse24_ops() + _cache_ops()


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
        _on_cpu("int8_linear"),
        _kernel("int8_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
        _kernel("w4a_fp8_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=1),
        _kernel("w4a_fp8_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
        _kernel("int8_wo_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=1),
        _kernel("int8_wo_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
        _kernel("int4_wo_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=1),
        _kernel("int4_wo_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
        _on_cpu("int8_wo_linear"),
        _on_cpu("int8_wo_grouped_linear"),
        _on_cpu("int4_wo_linear"),
        _on_cpu("int4_wo_grouped_linear"),
        replace(_on_cpu("int8_paged_attention"), kv_dtypes=frozenset({"int8"})),
        _on_int8_cache("int8_kv_write", "scaled_kv_write"),
        _on_int8_cache("int8_rotary_kv_write", "rotary_kv_write"),
        replace(_on_int8_cache("int8_paged_attention", "ScaledPagedAttention"), refuses=_refuses_attention),
        *fusions.kernels(),
        *_sparse24_kernels(),
        *_stored_kernels(),
    )


def _writable(precision: Precision) -> Precision:
    """One in which `plexor quantize` writes checkpoints."""
    return replace(
        precision,
        written=f"plexor_quant.written.compressed_tensors:{precision.name}",
        calibrate=f"plexor_quant.calibration.precisions:{precision.name}",
    )


def _int4_wo(name: str, target: str, scales: str) -> Precision:
    return Precision(
        name=name,
        format=f"plexor_quant.int4_wo:{target}",
        summary=f"4-bit weights {scales}, activations in the model's dtype",
        needs="fast on compute capability 9.0; runs anywhere, in a quarter of bfloat16's memory",
    )


def _op(name: str) -> Op:
    return Op(
        name=name,
        reference=f"plexor_quant.kernels.reference.{name}:{name}",
        samples=f"plexor_quant.kernels.samples:{name}",
        tolerance=_SUMMED,
    )


def _sparse24_ops() -> tuple[Op, ...]:
    return tuple(
        replace(_op(name), samples=f"plexor_quant.kernels.sparse24_samples:{name}")
        for name in (f"{weights}_{kind}" for kind in ("linear", "grouped_linear") for weights in _SPARSE24)
    )


def _sparse24_kernels() -> tuple[Kernel, ...]:
    return (
        _kernel("sparse24_linear", _CUDA, frozenset({"bfloat16", "float16"}), capability=(7, 0), multiple=1),
        _kernel("sparse24_fp8_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=1),
        _kernel("sparse24_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
        _kernel("sparse24_fp8_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
        _on_cpu("sparse24_linear"),
        _on_cpu("sparse24_grouped_linear"),
        *(
            Kernel(
                op=f"{weights}_linear",
                provider="cuda",
                load=f"plexor_quant.kernels.cuda.{weights}_linear:{weights}_linear",
                devices=_CUDA,
                dtypes=frozenset({"bfloat16", "float16"}),
                capability=(9, 0),
                priority=20,
                refuses="plexor_quant.kernels.cuda.sparse24_refusal:refuses",
            )
            for weights in _SPARSE24
        ),
    )


def _stored_kernels() -> tuple[Kernel, ...]:
    """Those of what only checkpoints have: one scale for all inputs, and e4m3 weights in blocks."""
    return (
        _kernel("fp8_static_linear", _CUDA, _BFLOAT16, capability=(8, 9), multiple=16),
        Kernel(
            op="fp8_static_grouped_linear",
            provider="torch",
            load="plexor_quant.kernels.torch.fp8_static_grouped_linear:fp8_static_grouped_linear",
            devices=_CUDA,
            dtypes=_BFLOAT16,
            capability=(9, 0),
            refuses=_refuses_scaled_grouped,
        ),
        _kernel("int8_static_linear", _CUDA, _FLOATS, capability=(8, 0), multiple=8),
        _kernel("int8_static_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
        _kernel("w4a_fp8_static_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=1),
        _kernel("w4a_fp8_static_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 0), multiple=8),
        _kernel("fp8_block_linear", _CUDA, _BFLOAT16, capability=(8, 9), multiple=1),
        _on_blocks("fp8_block_linear", frozenset({"bfloat16", "float16"})),
        _on_blocks("fp8_block_grouped_linear", _BFLOAT16),
        _kernel("fp8_block_grouped_linear", _CUDA, _BFLOAT16, capability=(8, 9), multiple=8),
    )


def _on_blocks(op: str, dtypes: frozenset[str]) -> Kernel:
    """A Triton kernel that multiplies by e4m3 weights in blocks as they lie."""
    return Kernel(
        op=op,
        provider="triton",
        load=f"plexor_quant.kernels.triton.{op}:{op}",
        devices=_CUDA,
        dtypes=dtypes,
        capability=(8, 9),
        priority=20,
        refuses="plexor_quant.kernels.triton.fp8_block_linear:refuses",
    )


def _on_cpu(op: str) -> Kernel:
    return Kernel(op=op, provider="cpu", load=f"plexor_quant.kernels.cpu.{op}:{op}", devices=_CPU, dtypes=_FLOATS)


def _on_int8_cache(op: str, name: str) -> Kernel:
    """A Triton kernel of the core's, for entries with scales."""
    return Kernel(
        op=op,
        provider="triton",
        load=f"plexor.api:{name}",
        devices=_CUDA,
        dtypes=_FLOATS,
        kv_dtypes=frozenset({"int8"}),
    )


def _refuses_attention(facts: Facts) -> str | None:
    head_size = facts.shape.get("head_size", 0)
    if head_size > 256:
        return f"holds a head of at most 256 features in registers, not {head_size}"
    return None


def _cache_ops() -> tuple[Op, ...]:
    """What stores in and reads from a cache of int8 with scales."""
    tolerances = {
        "int8_kv_write": _ROUNDED,
        "int8_rotary_kv_write": _ROUNDED,
        "int8_paged_attention": _SUMMED,
    }
    return tuple(
        Op(
            name=name,
            reference=f"plexor_quant.kernels.reference.{name}:{name}",
            samples=f"plexor_quant.kernels.kv_samples:{name}_samples",
            tolerance=tolerance,
        )
        for name, tolerance in tolerances.items()
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
