"""Products with coded weights in kernels of this plugin, and the ops that do more than such a product.

A fused op is a format's product with what the core's op of the same kind does around it (plexor.api.Fusion).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from plexor.api import Kernel, Op

if TYPE_CHECKING:
    from plexor.api import Fusion

_KINDS: Mapping[Fusion, str] = MappingProxyType(
    {
        "norm": "norm_linear",
        "add": "linear_add",
        "norm_gated": "norm_gated_linear",
        "norm_rotary": "norm_rotary_linear",
    }
)
_BYTES, _NIBBLES = ("fp8", "int8", "int8_wo"), ("w4a_fp8", "int4_wo")
_CACHES = frozenset({"float32", "float16", "bfloat16", "float8_e4m3fn"})
# Sums of what the reference rounds on the way and a provider may not, and a gate of two such factors: as the core's ops
# of the same kinds.
_STEPPED: Mapping[str, tuple[float, float]] = {
    "float32": (1e-4, 2e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (1.6e-2, 3.2e-2),
}
_GATED: Mapping[str, tuple[float, float]] = {
    name: (2 * relative, 4 * absolute) for name, (relative, absolute) in _STEPPED.items()
}


def fused_ops(op: str) -> Mapping[Fusion, str]:
    """The ops that do more than the product `op` of a format; none for a format without."""
    name = op.removesuffix("_linear")
    return {fusion: f"{name}_{kind}" for fusion, kind in _KINDS.items()} if name in _BYTES + _NIBBLES else {}


def ops() -> Iterable[Op]:
    """Those that do more than a product."""
    for name in _BYTES + _NIBBLES:
        for kind in _KINDS.values():
            yield Op(
                name=f"{name}_{kind}",
                reference=f"plexor_quant.kernels.reference.fused:{name}_{kind}",
                samples=f"plexor_quant.kernels.fused_samples:{name}_{kind}",
                tolerance=_GATED if kind == "norm_gated_linear" else _STEPPED,
            )


def kernels() -> Iterable[Kernel]:
    """The providers in CUDA C++ of these and of the products themselves."""
    for name in _BYTES + _NIBBLES:
        for kind in ("linear", *_KINDS.values()):
            refuses = "refuses_bytes" if name in _BYTES else "refuses_nibbles"
            kernel = Kernel(
                op=f"{name}_{kind}",
                provider="cuda",
                load=f"plexor_quant.kernels.cuda.providers:{name}_{kind}",
                devices=frozenset({"cuda"}),
                dtypes=frozenset({"bfloat16", "float16"}),
                capability=(9, 0),
                priority=20,
                refuses=f"plexor_quant.kernels.cuda.refusal:{refuses}",
            )
            yield replace(kernel, kv_dtypes=_CACHES) if kind == "norm_rotary_linear" else kernel
