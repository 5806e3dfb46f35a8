"""Every provider of the plugin's ops agrees with the reference: generated from the kernel table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from plexor.api import Facts, KernelTable
from plexor.testing.kernels import cases, check_kernel, reason_to_skip
from plexor_quant import plugin
from plexor_quant.kernels.torch import fp8_linear, int8_linear
from plexor_quant.rounding import round_e4m3, round_int8

TABLE = KernelTable(plugin.ops(), plugin.kernels())
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
# torch has these products on a CPU as well, so that all but its CUDA code can be held to the reference here.
CUDA_ONLY = ("fp8_grouped_linear", "fp8_static_grouped_linear")
PORTABLE = {
    kernel.op: KernelTable(plugin.ops(), [replace(kernel, devices=frozenset({"cpu"}), capability=None)])
    for kernel in plugin.kernels()
    if kernel.provider == "torch" and kernel.op not in CUDA_ONLY
}


@pytest.mark.parametrize(("op", "provider", "dtype"), list(cases(TABLE, CPU)), ids=str)
def test_provider_agrees_with_reference(op: str, provider: str, dtype: torch.dtype) -> None:
    reason = reason_to_skip(TABLE, op, provider, CPU, dtype)
    if reason is not None:
        pytest.skip(reason)
    check_kernel(TABLE, op, provider, CPU, dtype)


@pytest.mark.parametrize("op", PORTABLE)
def test_product_of_torch_agrees_on_a_cpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over codes rounded by torch: Triton's interpreter halves e4m3 numbers that are rounded up to a power of two."""
    for module, exact in ((fp8_linear, round_e4m3), (int8_linear, round_int8)):
        monkeypatch.setattr(module, "round_rows", lambda x, _, exact=exact: exact(x))
    check_kernel(PORTABLE[op], op, "torch", CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("op", "sizes", "capability", "says"),
    [
        ("fp8_linear", (7, 256), (9, 0), "needs out_features in multiples of 16, not 7"),
        ("fp8_static_linear", (64, 250), (9, 0), "needs in_features in multiples of 16, not 250"),
        ("fp8_linear", (64, 256), (8, 0), "needs compute capability 8.9, this device has 8.0"),
        ("fp8_block_linear", (64, 256), (7, 5), "needs compute capability 8.9, this device has 7.5"),
    ],
)
def test_what_a_kernel_is_not_made_for_falls_to_another_with_the_reason(
    op: str, sizes: tuple[int, int], capability: tuple[int, int], says: str
) -> None:
    shape = {"out_features": sizes[0], "in_features": sizes[1]}
    choice = TABLE.explain(op, Facts("cuda", "bfloat16", capability, None, shape))
    assert choice.winner == "reference"
    assert next(verdict.reason for verdict in choice.verdicts if verdict.provider == "torch") == says


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("op", "provider", "dtype"), list(cases(TABLE, CUDA)), ids=str)
def test_provider_agrees_with_reference_on_cuda(op: str, provider: str, dtype: torch.dtype) -> None:
    kernel = next(kernel for kernel in TABLE.kernels(op) if kernel.provider == provider)
    if kernel.capability is not None and torch.cuda.get_device_capability() < kernel.capability:
        pytest.skip("this device is older than the provider asks for")
    check_kernel(TABLE, op, provider, CUDA, dtype)
