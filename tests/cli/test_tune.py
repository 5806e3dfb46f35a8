"""`plexor tune` as its user sees it where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from tests.cli.test_commands import run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "tune", "--model", "demo")
    assert (code, out) == (2, "")
    assert err == "plexor: tune measures kernels of a GPU and finds none here: run it where the model is to run\n"
