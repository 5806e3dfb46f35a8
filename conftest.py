"""What every test runs under: Triton's interpreter where there is no GPU, one thread, and the same draws each time."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    # Read by triton when it is imported, which no test module does before this file.
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
settings.register_profile("plexor", derandomize=True, deadline=None)
settings.load_profile("plexor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
