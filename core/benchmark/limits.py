"""Measures what a device can do at most: how fast it reads, multiplies and attends, each at its best of a few ways."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from plexor.benchmark.bound import DeviceRates
from plexor.benchmark.cost import ModelCost

ROUNDS = 5
"""The fastest of these counts: a limit is what the device has been seen to reach."""

GIB = 1 << 30
PACKED = torch.uint8
"""How formats with fewer than 8 bits store numbers: several in a byte, widened before they are multiplied."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """read_bytes: streamed in one reading. width: of the square product. tokens: of the prompt that attends to itself.

    calls: in one round.
    """

    read_bytes: int
    width: int
    tokens: int
    calls: int


ON_GPU = Sizes(read_bytes=4 * GIB, width=8192, tokens=8192, calls=20)
ON_CPU = Sizes(read_bytes=GIB // 2, width=1024, tokens=1024, calls=2)


def measure_rates(device: torch.device, dtype: torch.dtype, cost: ModelCost, sizes: Sizes | None = None) -> DeviceRates:
    """The rates that the model can use. dtype: of its activations. sizes: None for those of the device's kind."""
    sizes = sizes or (ON_GPU if device.type == "cuda" else ON_CPU)
    stored = {weight.dtype for weight in cost.weights}
    layer = max(cost.attention, key=lambda layer: layer.operations)
    return DeviceRates(
        read_rate(device, sizes),
        product_rates(device, dtype, stored, sizes),
        attention_rate(device, dtype, layer.num_heads, layer.head_size, sizes),
        sizes.tokens,
    )


def read_rate(device: torch.device, sizes: Sizes) -> float:
    """Bytes a second: on a CPU by torch's sum, which falls short by 5 % on a GPU, where a kernel of our own reads."""
    count = sizes.read_bytes // 4
    if device.type == "cpu":
        floats = torch.ones(count)
        return 4 * count / _fastest(device, sizes.calls, floats.sum)

    from plexor.benchmark.stream import read_sums  # Triton is not installed everywhere

    numbers = torch.randint(1 << 30, (count,), dtype=torch.int32, device=device)
    ways = product((2048, 4096, 8192), (4, 16), (4, 8))
    seconds = [_fastest(device, sizes.calls, partial(read_sums, numbers, *way)) for way in ways]
    return 4 * count / min(seconds)


def product_rates(
    device: torch.device, dtype: torch.dtype, stored: Iterable[torch.dtype], sizes: Sizes
) -> dict[torch.dtype, float]:
    """Operations a second of a square product on random numbers, for each dtype that weights are stored in.

    A dtype that the device has no product for is widened to the activations' and counts at their rate. What packed
    numbers are widened to is their format's affair: they count at the fastest rate of all.
    """
    wanted = set(stored)
    tried = wanted | {dtype} | (set(_NARROW) if PACKED in wanted else set())
    rates = {each: _product_rate(device, each, sizes) for each in sorted(tried - {PACKED}, key=str)}
    known = {each: rate for each, rate in rates.items() if rate is not None}
    fallback = max(known.values()) if PACKED in wanted else known[dtype]
    return {each: known.get(each, fallback if each == PACKED else known[dtype]) for each in wanted}


def attention_rate(device: torch.device, dtype: torch.dtype, num_heads: int, head_size: int, sizes: Sizes) -> float:
    """Operations a second of causal attention within one prompt, with torch's fastest way of computing it."""
    shape = (1, num_heads, sizes.tokens, head_size)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    seconds: list[float] = []
    for way in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        if way is SDPBackend.MATH and seconds:
            break  # it keeps all scores in memory, and is no match for any other
        found = _try_attention(way, device, sizes.calls, q, k, v)
        seconds += [] if found is None else [found]
    return 2 * num_heads * head_size * sizes.tokens * (sizes.tokens + 1) / min(seconds)


def _try_attention(way: SDPBackend, device: torch.device, calls: int, q: Tensor, k: Tensor, v: Tensor) -> float | None:
    """Seconds, or None where this way is not there for these sizes."""
    attend = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel(way), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason against a way before it raises
        try:
            return _fastest(device, calls, lambda: attend(q, k, v, is_causal=True))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None


def _product_rate(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float | None:
    """None where torch has no product of this dtype on the device."""
    make = _NARROW.get(dtype, _plain_product)
    if make is not _plain_product and device.type == "cpu":
        return None
    try:
        seconds = _fastest(device, sizes.calls, make(device, dtype, sizes.width))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    return 2 * sizes.width**3 / seconds


def _plain_product(device: torch.device, dtype: torch.dtype, width: int) -> Callable[[], Tensor]:
    x, weight = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    return lambda: x @ weight.t()


def _scaled_product(device: torch.device, dtype: torch.dtype, width: int) -> Callable[[], Tensor]:
    """8-bit floats with a scale for each row of both sides."""
    x, weight = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    ones = torch.ones(width, 1, device=device)
    return lambda: torch._scaled_mm(
        x, weight.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _integer_product(device: torch.device, dtype: torch.dtype, width: int) -> Callable[[], Tensor]:
    x, weight = (torch.randint(-127, 128, (width, width), dtype=dtype, device=device) for _ in range(2))
    return lambda: torch._int_mm(x, weight.t())


_NARROW: dict[torch.dtype, Callable[[torch.device, torch.dtype, int], Callable[[], Tensor]]] = {
    torch.float8_e4m3fn: _scaled_product,
    torch.int8: _integer_product,
}


@torch.inference_mode()
def _fastest(device: torch.device, calls: int, call: Callable[[], object]) -> float:
    """Seconds of one call, in the fastest round; the first round is a warm-up."""
    timed = _timed_on_gpu if device.type == "cuda" else _timed_on_cpu
    return min([timed(calls, call) for _ in range(ROUNDS + 1)][1:]) / calls


def _timed_on_cpu(calls: int, call: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - started


def _timed_on_gpu(calls: int, call: Callable[[], object]) -> float:
    """By the device's own clock, which does not count how long the launches took to reach it."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000
