"""Rates come from what was run; here with clocks of our own, since tests do not measure time."""

from collections.abc import Callable

import pytest
import torch

from plexor.benchmark import limits
from plexor.benchmark.cost import AttentionCost, ModelCost, WeightCost
from plexor.benchmark.limits import Sizes, attention_rate, measure_rates, product_rates, read_rate

CPU = torch.device("cpu")
SMALL = Sizes(read_bytes=1 << 12, width=24, tokens=9, calls=3)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What each timed round is said to take, in turn and over again; the calls are made."""
    said = [0.5]
    rounds = iter(range(10**6))

    def timed(calls: int, call: Callable[[], object]) -> float:
        for _ in range(calls):
            call()
        return said[next(rounds) % len(said)]

    monkeypatch.setattr(limits, "_timed_on_cpu", timed)
    return said


def test_a_rate_is_work_over_the_time_of_one_call(seconds: list[float]) -> None:
    assert read_rate(CPU, SMALL) == pytest.approx(4096 / (0.5 / 3))
    assert attention_rate(CPU, torch.float32, 2, 8, SMALL) == pytest.approx(4 * 2 * 8 * 45 / (0.5 / 3))
    rates = product_rates(CPU, torch.float32, {torch.float32}, SMALL)
    assert rates == {torch.float32: pytest.approx(2 * 24**3 / (0.5 / 3))}


def test_the_fastest_round_counts_and_the_first_does_not(seconds: list[float]) -> None:
    seconds[:] = [0.01, 0.9, 0.4, 0.3, 0.6, 0.7]
    assert read_rate(CPU, SMALL) == pytest.approx(4096 / (0.3 / 3))


def test_what_the_device_cannot_multiply_counts_at_the_activations_rate(seconds: list[float]) -> None:
    narrow = {torch.int8, torch.float8_e4m3fn, torch.bfloat16}
    rates = product_rates(CPU, torch.bfloat16, narrow, SMALL)
    assert set(rates) == narrow
    assert len(set(rates.values())) == 1


def test_packed_numbers_count_at_the_fastest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {torch.bfloat16: 5.0, torch.float8_e4m3fn: 9.0, torch.int8: None}
    monkeypatch.setattr(limits, "_product_rate", lambda device, dtype, sizes: found[dtype])
    stored = {torch.uint8, torch.bfloat16, torch.int8}
    rates = product_rates(CPU, torch.bfloat16, stored, SMALL)
    assert rates == {torch.uint8: 9.0, torch.bfloat16: 5.0, torch.int8: 5.0}


def test_all_rates_of_a_model_are_found(seconds: list[float]) -> None:
    cost = ModelCost((WeightCost(torch.uint8, 8, 16),), (AttentionCost(4, 2, 8, None), AttentionCost(4, 5, 8, None)))
    rates = measure_rates(CPU, torch.bfloat16, cost, SMALL)
    assert set(rates.products) == {torch.uint8}
    assert rates.attention == pytest.approx(4 * 5 * 8 * 45 / (0.5 / 3))
    assert rates.attention_tokens == 9
