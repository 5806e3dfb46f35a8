"""Every provider of the plugin's op agrees with the reference: generated from the kernel table."""

from __future__ import annotations

import pytest
import torch

from plexor.api import KernelTable
from plexor.testing.kernels import cases, check_kernel, reason_to_skip
from plexor_moe import plugin
from plexor_moe.kernels.reference.moe_route import moe_route

TABLE = KernelTable(plugin.ops(), plugin.kernels())
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize(("op", "provider", "dtype"), list(cases(TABLE, CPU)), ids=str)
def test_provider_agrees_with_reference(op: str, provider: str, dtype: torch.dtype) -> None:
    reason = reason_to_skip(TABLE, op, provider, CPU, dtype)
    if reason is not None:
        pytest.skip(reason)
    check_kernel(TABLE, op, provider, CPU, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("op", "provider", "dtype"), list(cases(TABLE, CUDA)), ids=str)
def test_provider_agrees_with_reference_on_cuda(op: str, provider: str, dtype: torch.dtype) -> None:
    check_kernel(TABLE, op, provider, CUDA, dtype)


def test_of_equal_logits_the_lower_number_comes_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0]])
    weights, experts = moe_route(logits, 3, "softmax", True)
    assert experts.tolist() == [[1, 2, 4], [0, 1, 2], [4, 0, 1]]
    torch.testing.assert_close(weights[:2], torch.full((2, 3), 1 / 3))


def test_weights_are_those_of_the_definition() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    masses = torch.tensor([2.0, 1.0, 0.0]).exp()
    plain, experts = moe_route(logits, 2, "softmax", False)
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(plain[0], masses[:2] / masses.sum())
    torch.testing.assert_close(moe_route(logits, 2, "softmax", True)[0][0], masses[:2] / masses[:2].sum())
    opened = torch.tensor([2.0, 1.0]).sigmoid()
    torch.testing.assert_close(moe_route(logits, 2, "sigmoid", False)[0][0], opened)
    torch.testing.assert_close(moe_route(logits, 2, "sigmoid", True)[0][0], opened / opened.sum())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("provider", ["reference", *(kernel.provider for kernel in plugin.kernels())])
def test_a_token_that_is_not_a_number_still_goes_to_experts_that_exist(provider: str) -> None:
    if provider == "reference":
        route = TABLE.reference("moe_route")
    else:
        if torch.cuda.is_available():
            pytest.skip("on a CUDA device the kernel cannot take tensors of the CPU")
        from plexor_moe.kernels.triton.moe_route import moe_route as route
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    logits[1] = float("nan")
    weights, experts = route(logits, 4, "softmax", True)
    assert sorted(set(experts[1].tolist())) == sorted(experts[1].tolist())
    assert set(experts[1].tolist()) <= set(range(6))
    assert weights[[0, 2]].isfinite().all()
