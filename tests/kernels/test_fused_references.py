"""The fused ops' references against float64, and on rows of padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from plexor.kernels.reference.linear_add import linear_add
from plexor.kernels.reference.norm_gated_linear import norm_gated_linear
from plexor.kernels.reference.norm_linear import norm_linear
from plexor.kernels.reference.norm_rotary_linear import norm_rotary_linear

EPS = 1e-5


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor, gain: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gain
    return normed @ weight.double().T + bias


def test_products_of_normed_rows() -> None:
    x, gain, weight, bias = normal(0, 3, 10), normal(1, 10), normal(2, 14, 10), normal(3, 14)
    product = expected(x, gain, weight, bias)
    stored = {"weight": weight}
    torch.testing.assert_close(norm_linear(x, gain, EPS, stored, bias), product.float())
    torch.testing.assert_close(norm_linear(x, gain, EPS, stored), (product - bias).float())
    gate, up = product.chunk(2, dim=1)
    torch.testing.assert_close(norm_gated_linear(x, gain, EPS, stored, bias), (functional.silu(gate) * up).float())


def test_a_product_added_to_the_residual() -> None:
    x, weight, residual, bias = normal(0, 3, 10), normal(1, 6, 10), normal(2, 3, 6), normal(3, 6)
    before = residual.clone()
    summed = x.double() @ weight.double().T + residual
    torch.testing.assert_close(linear_add(x, {"weight": weight}, residual), summed.float())
    torch.testing.assert_close(linear_add(x, {"weight": weight}, residual, bias), (summed + bias).float())
    assert torch.equal(residual, before)


def test_queries_turn_and_keys_and_values_are_stored() -> None:
    """Two query heads of four features, one head of keys and values; half of each head turns by a right angle."""
    x, gain, weight, bias = normal(0, 3, 10), normal(1, 10), normal(2, 16, 10), normal(3, 16)
    cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    positions, slots = torch.tensor([1, 0, 1]), torch.tensor([3, 0, -1])
    cache = {part: torch.full((2, 2, 1, 4), 9.0) for part in ("keys", "values")}
    q = norm_rotary_linear(x, gain, EPS, {"weight": weight}, cos, sin, positions, slots, cache, bias)
    heads = expected(x, gain, weight, bias).float().view(3, 4, 4)
    turned = heads.clone()
    turned[0::2, :3, 0], turned[0::2, :3, 1] = -heads[0::2, :3, 1], heads[0::2, :3, 0]
    torch.testing.assert_close(q, turned[:, :2])
    keys, values = cache["keys"].view(4, 4), cache["values"].view(4, 4)
    torch.testing.assert_close(keys[[3, 0]], turned[:2, 2])
    torch.testing.assert_close(values[[3, 0]], heads[:2, 3])
    assert bool((keys[1:3] == 9).all())
    assert bool((values[1:3] == 9).all())
