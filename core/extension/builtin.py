"""What the core itself contributes, through the same hooks as any plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from plexor.extension.markers import hookimpl
from plexor.extension.specs import CheckpointFormat, Facts, Kernel, KVFormat, Op, Precision, Tolerance

_CPU = frozenset({"cpu"})
_CUDA = frozenset({"cuda"})
_FLOATS = frozenset({"float32", "float16", "bfloat16"})
_CACHES = _FLOATS | {"float8_e4m3fn"}
_EXACT = (0.0, 0.0)
# One rounding to the activation dtype, at a place where the float32 values may differ in their last bits.
_ROUNDED: Mapping[str, Tolerance] = {"float32": (1e-5, 1e-5), "float16": (2e-3, 2e-3), "bfloat16": (1.6e-2, 1e-2)}
# Long sums in another order.
_SUMMED: Mapping[str, Tolerance] = {"float32": (1e-4, 2e-5), "float16": (4e-3, 4e-3), "bfloat16": (1.6e-2, 1.6e-2)}
# Long sums of what the reference rounds on the way and a provider may not. With u for half a step at 1 (2^-8 in
# bfloat16, 2^-11 in float16), sums of size 1 move by 5 u at most, among tens of thousands, where normed rows have been
# rounded; and by up to 4 u where a sum of size 4 was rounded before a bias or a residual took most of it away.
_STEPPED: Mapping[str, Tolerance] = {**_SUMMED, "bfloat16": (1.6e-2, 3.2e-2)}
# silu(gate) * up, where the reference has rounded both factors. An error t of each moves it by |silu'(gate) * up| * t +
# |silu(gate)| * t; silu' is at most 1.1 and the factors reach 4 or 5, seldom both at once: 4 t. Relative errors add.
_GATED: Mapping[str, Tolerance] = {
    name: (2 * relative, 4 * absolute) for name, (relative, absolute) in _STEPPED.items()
}
_COPIED: Mapping[str, Tolerance] = dict.fromkeys(("float32", "float16", "bfloat16"), _EXACT)


@hookimpl
def ops() -> Iterable[Op]:
    return (
        _op("rms_norm", _ROUNDED),
        _op("silu_mul", _ROUNDED),
        _op("kv_write", _COPIED),
        _op("rotary_kv_write", _ROUNDED),
        _op("paged_attention", _SUMMED),
        _op("linear", _SUMMED),
        _op("norm_linear", _STEPPED),
        _op("linear_add", _STEPPED),
        _op("norm_gated_linear", _GATED),
        _op("norm_rotary_linear", _STEPPED),
        _op("grouped_linear", _SUMMED),
        _op("sample", _COPIED),
        _op("advance", {"float32": _EXACT}),
    )


@hookimpl
def kernels() -> Iterable[Kernel]:
    return (
        _triton("rms_norm"),
        _triton("silu_mul"),
        _triton_on_cache("kv_write", _refuses_narrow_cache),
        _triton_on_cache("rotary_kv_write", _refuses_narrow_cache),
        replace(
            _triton_on_cache("paged_attention", _refuses_attention),
            load="plexor.kernels.triton.paged_attention:PagedAttention",
        ),
        replace(
            _cuda("paged_attention", "PagedAttention"),
            kv_dtypes=frozenset({"float16", "bfloat16", "float8_e4m3fn"}),
            priority=15,
            refuses="plexor.kernels.cuda.attention_choice:refuses",
        ),
        Kernel(
            op="paged_attention",
            provider="cudnn",
            load="plexor.kernels.cudnn.paged_attention:PagedAttention",
            devices=_CUDA,
            dtypes=frozenset({"float16", "bfloat16"}),
            capability=(9, 0),
            kv_dtypes=frozenset({"float16", "bfloat16"}),
            priority=20,
            refuses="plexor.kernels.cudnn.paged_attention:refuses",
        ),
        Kernel(
            op="paged_attention",
            provider="torch",
            load="plexor.kernels.cpu.paged_attention:paged_attention",
            devices=_CPU,
            dtypes=_FLOATS,
            kv_dtypes=_CACHES,
        ),
        Kernel(
            op="linear",
            provider="onednn",
            load="plexor.kernels.cpu.linear:PackedLinear",
            devices=_CPU,
            dtypes=frozenset({"float32", "bfloat16"}),
            refuses="plexor.kernels.cpu.linear:refuses",
        ),
        _triton("linear"),
        _triton("norm_linear"),
        _triton("linear_add"),
        _triton("norm_gated_linear"),
        _triton_on_cache("norm_rotary_linear", _refuses_narrow_cache),
        _cuda("linear", "Linear"),
        _cuda("norm_linear", "NormLinear"),
        _cuda("linear_add", "LinearAdd"),
        _cuda("norm_gated_linear", "NormGatedLinear"),
        replace(_cuda("norm_rotary_linear", "NormRotaryLinear"), kv_dtypes=_CACHES),
        _triton("grouped_linear"),
        replace(_triton("sample"), load="plexor.kernels.triton.sample:Draw"),
        _triton("advance"),
        Kernel(
            op="sample",
            provider="torch",
            load="plexor.kernels.cpu.sample:sample",
            devices=_CPU,
            dtypes=_FLOATS,
        ),
    )


@hookimpl
def precisions() -> Iterable[Precision]:
    return (
        Precision(name="dense", format="plexor.model.dense:DenseFormat", summary="weights in the model's own dtype"),
    )


@hookimpl
def kv_formats() -> Iterable[KVFormat]:
    return (
        KVFormat(
            name="dense", storage="plexor.model.dense:kv_storage", summary="keys and values in the model's own dtype"
        ),
    )


@hookimpl
def checkpoint_formats() -> Iterable[CheckpointFormat]:
    source = "plexor.checkpoint.source"
    return (CheckpointFormat(name="safetensors", detects=f"{source}:detects", open=f"{source}:open_source"),)


def _op(name: str, tolerance: Mapping[str, Tolerance]) -> Op:
    return Op(
        name=name,
        reference=f"plexor.kernels.reference.{name}:{name}",
        samples=f"plexor.kernels.samples:{name}",
        tolerance=tolerance,
    )


def _triton(op: str) -> Kernel:
    """A Triton kernel that touches no cache."""
    return Kernel(op=op, provider="triton", load=f"plexor.kernels.triton.{op}:{op}", devices=_CUDA, dtypes=_FLOATS)


def _cuda(op: str, name: str) -> Kernel:
    """A kernel in CUDA C++ for the copy engine of compute capability 9.0, compiled when it is first launched."""
    return Kernel(
        op=op,
        provider="cuda",
        load=f"plexor.kernels.cuda.{op}:{name}",
        devices=_CUDA,
        dtypes=frozenset({"bfloat16", "float16"}),
        capability=(9, 0),
        priority=20,
        refuses="plexor.kernels.cuda.refusal:refuses",
    )


def _triton_on_cache(op: str, refuses: Callable[[Facts], str | None]) -> Kernel:
    """A Triton kernel that reads or writes the cache, in any of the dtypes that it is stored in."""
    return replace(_triton(op), kv_dtypes=_CACHES, refuses=refuses)


def _refuses_narrow_cache(facts: Facts) -> str | None:
    if facts.kv_dtype == "float8_e4m3fn" and facts.capability is not None and facts.capability < (8, 9):
        return "needs compute capability 8.9 for a cache of float8_e4m3fn, this device has {}.{}".format(
            *facts.capability
        )
    return None


def _refuses_attention(facts: Facts) -> str | None:
    head_size = facts.shape.get("head_size", 0)
    if head_size > 256:
        return f"holds a head of at most 256 features in registers, not {head_size}"
    return _refuses_narrow_cache(facts)
