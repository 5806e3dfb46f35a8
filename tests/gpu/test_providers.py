"""Every provider of the core's ops agrees with its reference on a CUDA device: `pytest -m gpu tests/gpu plugins`."""

from __future__ import annotations

import pytest
import torch

from plexor.extension import builtin
from plexor.kernels.table import KernelTable
from plexor.testing.kernels import cases, check_kernel

TABLE = KernelTable(builtin.ops(), builtin.kernels())
CUDA = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("op", "provider", "dtype"), list(cases(TABLE, CUDA)), ids=str)
def test_provider_agrees_with_reference(op: str, provider: str, dtype: torch.dtype) -> None:
    check_kernel(TABLE, op, provider, CUDA, dtype)
