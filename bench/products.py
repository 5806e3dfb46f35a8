"""Times a decode step's products on a GPU: `python bench/products.py [--providers triton cuda] [--rows 1 2 4]`.

For each op of a published shape's layers: microseconds and TB/s of weight bytes by each provider, and in steps (cuBLAS
and small kernels), 32 launches over weights in rotation in one CUDA graph. Then all layers of the model in a row, each
product reading what the one before it wrote; a projection's queries stand for what attention would make of them. All
results are compared with the reference first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from plexor.errors import ConfigError
from plexor.extension import builtin
from plexor.kernels.table import KernelTable
from plexor.kernels.triton.rms_norm import rms_norm
from plexor.kernels.triton.rotary_kv_write import rotary_kv_write
from plexor.kernels.triton.silu_mul import silu_mul
from plexor.model.build import facts

SHAPES = ("bench/shapes/llama-3.1-8b.json", "bench/shapes/llama-3.2-1b.json")
STEPS = "steps"
LAUNCHES = 32
ROTATED_BYTES = 268 << 20
"""Of weights in rotation at least, several times what the second-level cache holds."""

EPS = 1e-5
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
Product = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the products of a model depend on."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocabulary: int

    @classmethod
    def read(cls, path: Path) -> Shape:
        raw = json.loads(path.read_text(encoding="utf-8"))
        heads = raw["num_attention_heads"]
        return cls(
            raw["hidden_size"],
            raw["intermediate_size"],
            heads,
            raw["num_key_value_heads"],
            raw.get("head_dim", raw["hidden_size"] // heads),
            raw["num_hidden_layers"],
            raw["vocab_size"],
        )

    @property
    def sizes(self) -> Mapping[str, tuple[str, int, int]]:
        """Each product's op, output features and input features."""
        attended = self.heads * self.head_size
        return {
            "qkv": ("norm_rotary_linear", attended + 2 * self.kv_heads * self.head_size, self.hidden),
            "o": ("linear_add", self.hidden, attended),
            "gate_up": ("norm_gated_linear", 2 * self.inner, self.hidden),
            "down": ("linear_add", self.hidden, self.inner),
            "head": ("linear", self.vocabulary, self.hidden),
        }

    def bytes_of(self, name: str) -> int:
        _, outputs, inputs = self.sizes[name]
        return outputs * inputs * DTYPE.itemsize


class Inputs:
    """What all products of a shape are given besides their weights, for so many rows."""

    def __init__(self, shape: Shape, rows: int) -> None:
        half = shape.head_size // 2
        angle = torch.arange(64, device=DEVICE).unsqueeze(1) * 10000.0 ** (-torch.arange(half, device=DEVICE) / half)
        self.tables = (angle.cos(), angle.sin())
        self.positions = torch.arange(rows, device=DEVICE) + 7
        self.slots = torch.arange(rows, device=DEVICE) * 5
        entries = (4, 16, shape.kv_heads, shape.head_size)
        self.cache = {part: torch.zeros(entries, dtype=DTYPE, device=DEVICE) for part in ("keys", "values")}
        self.gain = 1 + 0.1 * torch.randn(shape.hidden, device=DEVICE).to(DTYPE)
        self.x = {name: torch.randn(rows, sizes[2], device=DEVICE).to(DTYPE) for name, sizes in shape.sizes.items()}
        self.residual = torch.randn(rows, shape.hidden, device=DEVICE).to(DTYPE)

    def call(self, op: str, product: Product, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """One call of an op."""
        if op == "linear":
            return product(x, weight)
        stored = {"weight": weight}
        if op == "linear_add":
            return product(x, stored, residual)
        if op == "norm_gated_linear":
            return product(x, self.gain, EPS, stored)
        where = (*self.tables, self.positions, self.slots, self.cache)
        return product(x, self.gain, EPS, stored, *where).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="FILE", help="config.json of published shapes")
    parser.add_argument("--providers", nargs="+", default=("triton", "cuda"))
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 2, 4))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {str(DTYPE).removeprefix('torch.')}")
    for path in map(Path, arguments.shape):
        shape = Shape.read(path)
        for rows in arguments.rows:
            providers = (STEPS, *arguments.providers)
            for name in shape.sizes:
                print(f"{path.stem:<14} T {rows:<3} {name:<8} {time_product(shape, name, rows, providers)}", flush=True)
            print(f"{path.stem:<14} T {rows:<3} {'layers':<8} {time_layers(shape, rows, providers)}", flush=True)


def time_product(shape: Shape, name: str, rows: int, providers: Sequence[str]) -> str:
    """One product by each provider."""
    op, inputs = shape.sizes[name][0], Inputs(shape, rows)
    weights = [draw(shape, name) for _ in range(min(LAUNCHES, -(-ROTATED_BYTES // shape.bytes_of(name))))]
    figures = []
    for provider in providers:
        try:
            products = [bind(shape, name, provider) for _ in weights]
        except ConfigError as error:
            figures.append(f"{provider}: {error}")
            continue
        check(op, inputs, products[0], inputs.x[name], weights[0])

        def run(products: Sequence[Product] = products) -> None:
            for index in range(LAUNCHES):
                turn = index % len(weights)
                inputs.call(op, products[turn], inputs.x[name], weights[turn], inputs.residual)

        figures.append(as_figure(provider, time_graph(run) / LAUNCHES, shape.bytes_of(name)))
    return " | ".join(figures)


def time_layers(shape: Shape, rows: int, providers: Sequence[str]) -> str:
    """All layers in a row, and how far their result is from that of the steps, relative to its size."""
    inputs = Inputs(shape, rows)
    names = ("qkv", "o", "gate_up", "down")
    weights = [{name: draw(shape, name) for name in names} for _ in range(shape.layers)]
    num_bytes = shape.layers * sum(map(shape.bytes_of, names))
    expected: Tensor | None = None
    figures = []
    for provider in providers:
        try:
            products = [{name: bind(shape, name, provider) for name in names} for _ in weights]
        except ConfigError as error:
            figures.append(f"{provider}: {error}")
            continue
        out = torch.empty_like(inputs.residual)

        def run(products: Sequence[Mapping[str, Product]] = products, out: Tensor = out) -> None:
            x = inputs.residual.clone()
            for layer, own in zip(products, weights, strict=True):
                for first, second in (("qkv", "o"), ("gate_up", "down")):
                    inner = inputs.call(shape.sizes[first][0], layer[first], x, own[first], x)
                    x = inputs.call(shape.sizes[second][0], layer[second], inner, own[second], x)
            out.copy_(x)

        figure = as_figure(provider, time_graph(run), num_bytes)
        expected = out if expected is None else expected
        figures.append(f"{figure} off {float((out - expected).float().norm() / expected.float().norm()):.1e}")
    return " | ".join(figures)


def draw(shape: Shape, name: str) -> Tensor:
    _, outputs, inputs = shape.sizes[name]
    return torch.randn(outputs, inputs, dtype=DTYPE, device=DEVICE) * inputs**-0.5


def bind(shape: Shape, name: str, provider: str) -> Product:
    """A provider's function for one layer, as a model would bind it; ConfigError if it cannot serve."""
    op, outputs, inputs = shape.sizes[name]
    if provider == STEPS:
        return IN_STEPS[op]
    sizes = {"out_features": outputs, "in_features": inputs}
    if op == "norm_rotary_linear":
        heads = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads}
        sizes |= heads | {"head_size": shape.head_size, "rotary_size": shape.head_size}
    table = KernelTable(builtin.ops(), builtin.kernels(), {op: provider})
    return table.bind(op, facts(DEVICE, DTYPE, DTYPE if op == "norm_rotary_linear" else None, **sizes))


def check(op: str, inputs: Inputs, product: Product, x: Tensor, weight: Tensor) -> None:
    """AssertionError where the result, or what is in the cache, is not the reference's."""
    table = KernelTable(builtin.ops(), builtin.kernels())
    relative, absolute = table.ops[op].tolerance[str(DTYPE).removeprefix("torch.")]
    results = []
    for function in (product, table.reference(op)):
        for entries in inputs.cache.values():
            entries.zero_()
        y = inputs.call(op, function, x, weight, inputs.residual.clone())
        results.append((y, *(entries.clone() for entries in inputs.cache.values())))
    torch.testing.assert_close(*results, rtol=relative, atol=absolute)


def time_graph(run: Callable[[], None]) -> float:
    """Seconds of a replay, median of 9."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    seconds = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def as_figure(provider: str, seconds: float, num_bytes: int) -> str:
    return f"{provider} {seconds * 1e6:8.1f} us {num_bytes / seconds / 1e12:.2f} TB/s"


def norm_gated_in_steps(x: Tensor, gain: Tensor, eps: float, stored: Mapping[str, Tensor]) -> Tensor:
    return silu_mul(functional.linear(rms_norm(x, gain, eps), stored["weight"]))


def add_in_steps(x: Tensor, stored: Mapping[str, Tensor], residual: Tensor) -> Tensor:
    return residual + functional.linear(x, stored["weight"])


def norm_rotary_in_steps(
    x: Tensor,
    gain: Tensor,
    eps: float,
    stored: Mapping[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Mapping[str, Tensor],
) -> Tensor:
    kv_heads, size = cache["keys"].shape[2:]
    heads = functional.linear(rms_norm(x, gain, eps), stored["weight"]).unflatten(1, (-1, size))
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    return rotary_kv_write(q, k, v, cos, sin, positions, slots, cache)


IN_STEPS: Mapping[str, Product] = {
    "linear": functional.linear,
    "linear_add": add_in_steps,
    "norm_gated_linear": norm_gated_in_steps,
    "norm_rotary_linear": norm_rotary_in_steps,
}


if __name__ == "__main__":
    main()
