"""How a product of few rows is multiplied: as was measured on this GPU (plexor.kernels.tuning), or else by a rule.

The rules are what was quickest on an H200 for published models among the other kernels of a layer: bench/NOTES.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product as every

from plexor.kernels.cuda.tiled_layout import TILED_CUTS, TiledCut, tiled_cut_for
from plexor.kernels.tuning import Choice, Choices, Product, find

STREAM_ROWS = 16
"""The most rows that stream_linear takes."""

TILED_ROWS = 256
"""The most rows for which tiled_linear is considered: the library multiplies more."""

_BOX = 64
"""Inputs that tiled_linear takes at once."""


@dataclass(frozen=True, slots=True)
class Stream:
    """By stream_linear. A tile has 16 * blocks weight rows, a stage of its ring `depth` inputs."""

    blocks: int
    depth: int


Cut = Stream | TiledCut | None
"""None leaves the product to the library."""


def possible(product: Product, num_rows: int, pair: int | None) -> tuple[Cut, ...]:
    """Every cut of a product with so many rows of x. pair: distance of weight rows that belong together, if any do."""
    num_outputs = product.outputs
    if num_rows <= STREAM_ROWS:
        whole = [blocks for blocks in (2, 1) if num_outputs % (16 * blocks) == (pair or 8 * blocks) % (8 * blocks) == 0]
        return tuple(Stream(blocks, depth) for blocks, depth in every(whole, (256, 512)))
    if num_rows > TILED_ROWS:
        return (None,)
    return (None, *(cut for cut in TILED_CUTS if cut.fits(num_rows, num_outputs, product.inputs // _BOX, pair)))


def rule(product: Product, num_rows: int, pair: int | None, num_multiprocessors: int) -> Cut:
    """What to do where nothing was measured."""
    wanted: Cut = None
    if num_rows <= STREAM_ROWS:
        narrow = product.outputs < 3072 and product.inputs >= 4096
        wanted = Stream(1, 512) if narrow else Stream(2, 256)
    elif num_rows <= _most_rows(product):
        wanted = tiled_cut_for(num_rows, product.outputs, product.inputs // _BOX, pair, num_multiprocessors)
    known = possible(product, num_rows, pair)
    if wanted in known:
        return wanted
    return Stream(1, 256) if Stream(1, 256) in known else None


def _most_rows(product: Product) -> int:
    """Beyond how many rows the library is faster. The gate saves the library's product a kernel."""
    if product.op == "norm_gated_linear":
        return TILED_ROWS
    return 64 if product.op == "linear" else 128


def choose(choices: Choices, product: Product, num_rows: int, pair: int | None, num_multiprocessors: int) -> Cut:
    """What was measured, if the kernels can do it, else the rule."""
    default = rule(product, num_rows, pair, num_multiprocessors)
    found = find(choices, product, num_rows, as_choice(default))
    return next((cut for cut in possible(product, num_rows, pair) if as_choice(cut) == found), default)


def as_choice(cut: Cut) -> Choice:
    """As a table of measured choices holds it."""
    return None if cut is None else asdict(cut)
