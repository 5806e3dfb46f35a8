"""The CPU's packed product follows its weight."""

import torch

from plexor.extension.specs import Facts
from plexor.kernels.cpu.linear import MAX_WEIGHT, PackedLinear, refuses


def test_a_weight_that_is_written_to_or_exchanged_is_packed_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, other = (torch.randn(shape, generator=generator) for shape in ((5, 24), (40, 24), (40, 24)))
    product = PackedLinear()
    for change in (lambda: None, lambda: weight.mul_(-2), lambda: weight.copy_(other)):
        change()
        torch.testing.assert_close(product(x, weight), x @ weight.T)
    torch.testing.assert_close(product(x, other[:20]), x @ other[:20].T)


def test_large_weights_are_refused() -> None:
    sizes = {"out_features": MAX_WEIGHT // 64, "in_features": 64}
    assert refuses(Facts("cpu", "float32", shape=sizes)) is None
    said = refuses(Facts("cpu", "float32", shape={**sizes, "in_features": 65}))
    assert said is not None
    assert f"{MAX_WEIGHT:,}" in said
