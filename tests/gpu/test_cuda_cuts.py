"""However a product is cut, the kernels in CUDA C++ agree with the references: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

DEVICE = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.skipif(find_spec("cuda") is None, reason="there is no cuda.bindings")
@pytest.mark.parametrize("kernel", ["stream_linear", "tiled_linear"])
def test_every_cut_agrees_with_the_reference(kernel: str) -> None:
    from bench import sanitize

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernels are for compute capability 9.x")
    launcher = sanitize.Launcher(DEVICE)
    num_multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    cases = [c for c in sanitize.cases(num_multiprocessors) if isinstance(c.cut, sanitize.KERNELS[kernel])]
    wrong = {str(case): said for case in cases if (said := launcher.check(case)) is not None}
    assert len(cases) > 100
    assert not wrong
