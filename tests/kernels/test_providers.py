"""Every provider of the core's ops that runs here agrees with the reference: generated from the kernel table."""

from __future__ import annotations

import pytest
import torch

from plexor.extension import builtin
from plexor.kernels.table import KernelTable
from plexor.testing.kernels import cases, check_kernel, reason_to_skip

TABLE = KernelTable(builtin.ops(), builtin.kernels())
CPU = torch.device("cpu")


@pytest.mark.parametrize(("op", "provider", "dtype"), list(cases(TABLE, CPU)), ids=str)
def test_provider_agrees_with_reference(op: str, provider: str, dtype: torch.dtype) -> None:
    reason = reason_to_skip(TABLE, op, provider, CPU, dtype)
    if reason is not None:
        pytest.skip(reason)
    check_kernel(TABLE, op, provider, CPU, dtype)
