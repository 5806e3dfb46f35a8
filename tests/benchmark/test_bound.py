"""The bound of each kind of workload, held to arithmetic by hand."""

import pytest
import torch

from plexor.benchmark.bound import DeviceRates, bound_workload
from plexor.benchmark.cost import AttentionCost, ModelCost, WeightCost
from plexor.benchmark.workloads import Workload

WEIGHT = WeightCost(torch.bfloat16, num_bytes=1000, operations=1000)
HEAD = WeightCost(torch.float32, num_bytes=400, operations=200, drawn_only=True)
LAYER = AttentionCost(num_bytes=10, num_heads=2, head_size=3, window=None)
COST = ModelCost((WEIGHT, HEAD), (LAYER,))


def rates(bandwidth: float, products: float, attention: float) -> DeviceRates:
    return DeviceRates(bandwidth, {torch.bfloat16: products, torch.float32: products / 2}, attention, 8)


def test_a_slow_memory_bounds_by_what_is_read() -> None:
    workload = Workload("", "decode", requests=3, prompt_tokens=4, new_tokens=6)
    bound = bound_workload(workload, COST, rates(100, 1e12, 1e12), max_sequences=8)
    assert bound.first_tokens == pytest.approx(14)
    steps = 5 * 1400 + 3 * 10 * (5 + 6 + 7 + 8 + 9)
    assert bound.total == pytest.approx(14 + steps / 100)


def test_a_slow_product_bounds_by_what_is_computed() -> None:
    workload = Workload("", "decode", requests=3, prompt_tokens=4, new_tokens=6)
    bound = bound_workload(workload, COST, rates(1e12, 10, 1e12), max_sequences=8)
    prefill = 12 * 1000 / 10 + 3 * 200 / 5
    assert bound.first_tokens == pytest.approx(prefill)
    assert bound.total == pytest.approx(prefill + 5 * (3 * 1000 / 10 + 3 * 200 / 5))


def test_attention_within_a_prompt_comes_on_top_of_the_products() -> None:
    workload = Workload("", "prefill", requests=1, prompt_tokens=7, new_tokens=1)
    bound = bound_workload(workload, COST, rates(1e12, 10, 2), max_sequences=8)
    assert bound.first_tokens == pytest.approx(7 * 100 + 40 + 24 * 28 / 2)
    assert bound.total == pytest.approx(bound.first_tokens)


def test_serving_reads_the_weights_once_for_as_many_as_run_at_once() -> None:
    workload = Workload("", "serve", requests=10, prompt_tokens=4, new_tokens=3)
    bound = bound_workload(workload, COST, rates(100, 1e12, 1e12), max_sequences=4)
    steps = 8  # 30 tokens, 4 in a step
    assert bound.total == pytest.approx((steps * 1400 + 10 * 10 * (5 + 6)) / 100)


def test_serving_computes_every_token_but_each_answers_last() -> None:
    workload = Workload("", "serve", requests=10, prompt_tokens=4, new_tokens=3)
    bound = bound_workload(workload, COST, rates(1e12, 10, 2), max_sequences=4)
    assert bound.total == pytest.approx(60 * 100 + 30 * 200 / 5 + 10 * 24 * 10 / 2)


def test_rates_are_said_in_units_of_their_size() -> None:
    said = str(rates(4.57e12, 6.93e14, 5.2e11))
    assert said.startswith("reading 4.57 TB/s, bfloat16 products 693 Top/s, float32 products 346 Top/s, ")
    assert said.endswith("attention within 8 tokens 520 Gop/s")
