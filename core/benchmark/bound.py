"""The least time that a workload can take on a device: what must be read and computed, at the rates it reached.

    read     = bytes / bandwidth
    compute  = products / their rate + attention within prompts / its rate
    bound    = the longer of the two, as if each hid the other completely

A decode workload is one prefill and then steps of one token for each request; its bound is the sum of both parts. A
serve workload mixes prompts and decodes in its steps, so its bound is taken over all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from plexor.benchmark.cost import ModelCost
from plexor.benchmark.workloads import Workload


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What one device reached. bandwidth: bytes read a second. products, by the dtype of the weights, and attention:
    operations a second. attention_tokens: the length it was measured at.
    """

    bandwidth: float
    products: Mapping[torch.dtype, float]
    attention: float
    attention_tokens: int

    def __str__(self) -> str:
        products = [f"{_name(dtype)} products {_rate(rate)}op/s" for dtype, rate in self.products.items()]
        attention = f"attention within {self.attention_tokens:,} tokens {_rate(self.attention)}op/s"
        return ", ".join([f"reading {_rate(self.bandwidth)}B/s", *products, attention])


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds until every request has its first token, and until the last token of all."""

    first_tokens: float
    total: float


def bound_workload(workload: Workload, cost: ModelCost, rates: DeviceRates, max_sequences: int) -> Bound:
    """max_sequences: requests that the engine runs at once."""
    first = _prefill_seconds(workload, cost, rates)
    if workload.kind == "serve":
        return Bound(first, _serve_seconds(workload, cost, rates, max_sequences))
    return Bound(first, first + _decode_seconds(workload, cost, rates))


def _prefill_seconds(workload: Workload, cost: ModelCost, rates: DeviceRates) -> float:
    num_tokens = workload.requests * workload.prompt_tokens
    num_bytes = cost.weight_bytes(num_tokens, workload.requests)
    compute = _product_seconds(cost, rates, num_tokens, workload.requests) + _attention_seconds(workload, cost, rates)
    return max(num_bytes / rates.bandwidth, compute)


def _decode_seconds(workload: Workload, cost: ModelCost, rates: DeviceRates) -> float:
    """The steps after the first token: each reads the weights once and every request's keys and values."""
    steps, requests = workload.new_tokens - 1, workload.requests
    num_bytes = steps * cost.weight_bytes(requests, requests) + _cache_bytes(workload, cost)
    return max(num_bytes / rates.bandwidth, steps * _product_seconds(cost, rates, requests, requests))


def _serve_seconds(workload: Workload, cost: ModelCost, rates: DeviceRates, max_sequences: int) -> float:
    """With as few steps as can be: in each, as many requests as may run at once draw a token."""
    at_once = min(workload.requests, max_sequences)
    steps = -(-workload.requests * workload.new_tokens // at_once)
    num_bytes = steps * cost.weight_bytes(at_once, at_once) + _cache_bytes(workload, cost)
    num_tokens, num_drawn = workload.requests * (workload.length - 1), workload.requests * workload.new_tokens
    compute = _product_seconds(cost, rates, num_tokens, num_drawn) + _attention_seconds(workload, cost, rates)
    return max(num_bytes / rates.bandwidth, compute)


def _cache_bytes(workload: Workload, cost: ModelCost) -> int:
    """A request's last token is drawn and never read."""
    return workload.requests * cost.cache_bytes(workload.prompt_tokens, workload.length - 1)


def _attention_seconds(workload: Workload, cost: ModelCost, rates: DeviceRates) -> float:
    return workload.requests * cost.attention_operations(workload.prompt_tokens) / rates.attention


def _product_seconds(cost: ModelCost, rates: DeviceRates, num_tokens: int, num_drawn: int) -> float:
    counts = cost.operations(num_tokens, num_drawn)
    return sum(count / rates.products[dtype] for dtype, count in counts.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rate(value: float) -> str:
    """4.57e12 as "4.57 T"."""
    return f"{value / 1e12:.3g} T" if value >= 1e12 else f"{value / 1e9:.3g} G"
