"""The kit notices what providers get wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from plexor.extension.specs import Kernel, Op
from plexor.kernels.op import Sample
from plexor.kernels.table import KernelTable
from plexor.testing.kernels import cases, check_kernel

CPU = torch.device("cpu")


def halve(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    """Return half of x [4] and store it."""
    cache["kept"][:4] = x / 2
    return x / 2


def samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    x = torch.arange(8, device=device, dtype=dtype)[::2]
    yield Sample("strided", (x, {"kept": torch.ones(6, device=device, dtype=dtype)}), written=(1,), kv_dtype="float32")


def good(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    assert x.stride() == (2,)
    return halve(x, cache)


def off(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    return halve(x, cache) + torch.tensor([0.0, 0.0, 0.01, 0.0])


def unwritten(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    halved = torch.empty_like(halve(x, cache))
    halved[:3] = x[:3] / 2
    return halved


def forgetful(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    return x / 2


def trespassing(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    cache["kept"][4] = 0.0
    return halve(x, cache)


def in_place(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    return halve(x, cache).copy_(x.div_(2))


def wide(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    return halve(x, cache).double()


def table(provider: str, kv_dtype: str = "float32") -> KernelTable:
    op = Op(
        name="halve",
        reference=f"{__name__}:halve",
        samples=f"{__name__}:samples",
        tolerance={"float32": (1e-6, 1e-6)},
    )
    kernel = Kernel(
        op="halve",
        provider=provider,
        load=f"{__name__}:{provider}",
        devices=frozenset({"cpu"}),
        dtypes=frozenset({"float32", "float16"}),
        kv_dtypes=frozenset({kv_dtype}),
    )
    return KernelTable((op,), (kernel,))


def test_a_good_provider_passes() -> None:
    check_kernel(table("good"), "halve", "good", CPU, torch.float32)


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("off", r"result: 1 of 4 values are off; at \(2,\) it is 2\.0\d+ instead of 2"),
        ("unwritten", r"at \(3,\) it is nan instead of 3"),
        ("forgetful", r"argument 1, kept: 3 of 6 values are off"),
        ("trespassing", r"argument 1, kept: 1 of 6 values are off; at \(4,\)"),
        ("in_place", r"argument 0, which is only read"),
        ("wide", r"dtype torch.float64 instead of torch.float32"),
    ],
)
def test_a_wrong_provider_is_noticed(provider: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message) as failure:
        check_kernel(table(provider), "halve", provider, CPU, torch.float32)
    assert f"halve by {provider}, sample 'strided'" in str(failure.value)


def spending(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    for sample in samples(device, dtype):
        yield replace(sample, spent=(0,))


def test_what_the_caller_gives_up_may_be_overwritten() -> None:
    op = replace(table("in_place").ops["halve"], samples=f"{__name__}:spending")
    kernels = KernelTable((op,), table("in_place").kernels("halve"))
    check_kernel(kernels, "halve", "in_place", CPU, torch.float32)


def test_a_provider_that_claims_no_sample_is_noticed() -> None:
    with pytest.raises(AssertionError, match="claims none of the op's samples"):
        check_kernel(table("good", kv_dtype="float16"), "halve", "good", CPU, torch.float32)


def test_cases_are_those_with_a_tolerance_and_a_device() -> None:
    assert list(cases(table("good"), CPU)) == [("halve", "good", torch.float32)]
    assert list(cases(table("good"), torch.device("cuda"))) == []
