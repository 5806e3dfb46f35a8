"""`plexor tune` as its user sees it where there is no GPU, and which layers it would measure."""

from __future__ import annotations

import pytest
import torch
from tests.cli.test_commands import run

from plexor.cli.tune import products_of
from plexor.extension.specs import Facts
from plexor.kernels.table import Choice
from plexor.kernels.tuning import Product


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "tune", "--model", "demo")
    assert (code, out) == (2, "")
    assert err == "plexor: tune measures kernels of a GPU and finds none here: run it where the model is to run\n"


def choice(op: str, outputs: int, inputs: int, dtype: str = "bfloat16") -> Choice:
    facts = Facts("cuda", dtype, (9, 0), None, {"out_features": outputs, "in_features": inputs, "bias": 1})
    return Choice(op, facts, "triton", ())


def test_each_dense_product_is_measured_once() -> None:
    choices = (
        Choice("rms_norm", Facts("cuda", "bfloat16", (9, 0), None, {"hidden_size": 64}), "triton", ()),
        choice("norm_rotary_linear", 96, 64),
        choice("linear_add", 64, 64),
        choice("norm_gated_linear", 256, 64),
        choice("norm_linear", 64, 64),
        choice("linear", 300, 64, "float32"),
        choice("linear", 300, 63),
        choice("grouped_linear", 64, 64),
    )
    assert products_of(choices) == (
        Product("linear", 96, 64, "bfloat16"),
        Product("linear", 64, 64, "bfloat16"),
        Product("gated_linear", 256, 64, "bfloat16"),
    )
