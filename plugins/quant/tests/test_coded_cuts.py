"""However products of few rows with coded weights are cut, they agree with float64."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.skipif(find_spec("cuda") is None, reason="there is no cuda.bindings")
def test_every_cut_agrees_with_float64() -> None:
    from bench import coded

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for compute capability 9.x")
    assert len(list(coded.cases())) > 200
    assert coded.check_all()
