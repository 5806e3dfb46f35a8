"""How a product of few rows is multiplied: as was measured on this GPU (plexor.kernels.tuning), or else by a rule.

The rules are what was quickest on an H200 for published models among the other kernels of a layer: bench/NOTES.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product as every

from plexor.kernels.cuda.tiled_layout import TiledCut
from plexor.kernels.tuning import Choice, Choices, Product, find

STREAM_ROWS = 16
"""The most rows that stream_linear takes."""

WIDE_ROWS = 256
"""The most rows that wide_linear takes, and tiled_linear here: the library multiplies more."""

_GROUP = 64
"""Half of the weight rows of a tile of wide_linear, and the inputs that it takes at once."""


@dataclass(frozen=True, slots=True)
class Stream:
    """By stream_linear. A tile has 16 * blocks weight rows, a stage of its ring `depth` inputs."""

    blocks: int
    depth: int


@dataclass(frozen=True, slots=True)
class Wide:
    """By wide_linear. split: blocks that share a tile."""

    split: int


Cut = Stream | Wide | TiledCut | None
"""None leaves the product to the library."""


_TILED = tuple(
    TiledCut(*numbers)
    for numbers in (
        (224, 1, 1),
        (224, 1, 2),
        (112, 1, 1),
        (112, 1, 2),
        (128, 1, 2),
        (96, 2, 1),
        (96, 2, 2),
        (128, 2, 1),
        (64, 1, 2),
        (64, 2, 1),
        (64, 2, 2),
        (128, 4, 1),
    )
)


def possible(product: Product, num_rows: int, pair: int | None) -> tuple[Cut, ...]:
    """Every cut of a product with so many rows of x. pair: distance of the weight rows that belong together, if any do.

    Four blocks that share a tile are not among them: they were slower on an H200 in nearly every layer.
    """
    num_outputs = product.outputs
    if num_rows <= STREAM_ROWS:
        whole = [blocks for blocks in (2, 1) if num_outputs % (16 * blocks) == (pair or 8 * blocks) % (8 * blocks) == 0]
        return tuple(Stream(blocks, depth) for blocks, depth in every(whole, (256, 512)))
    if num_rows > WIDE_ROWS:
        return (None,)
    tiled = tuple(cut for cut in _TILED if cut.fits(num_rows, num_outputs, product.inputs // _GROUP, pair))
    if num_outputs % (2 * _GROUP) or (pair or _GROUP) % _GROUP:
        return (None, *tiled)
    # Blocks that share a tile share out its inputs, and none may go without.
    wide = (Wide(1), Wide(2)) if product.inputs >= 2 * _GROUP else (Wide(1),)
    return (None, *wide, *tiled)


def rule(product: Product, num_rows: int, pair: int | None, num_multiprocessors: int) -> Cut:
    """What to do where nothing was measured."""
    wanted: Cut = None
    if num_rows <= STREAM_ROWS:
        narrow = product.outputs < 3072 and product.inputs >= 4096
        wanted = Stream(1, 512) if narrow else Stream(2, 256)
    elif num_rows <= _most_rows(product):
        # Two, where one each would leave half of the multiprocessors idle.
        wanted = Wide(2 if product.outputs // (2 * _GROUP) * 2 <= num_multiprocessors else 1)
    known = possible(product, num_rows, pair)
    if wanted in known:
        return wanted
    return Stream(1, 256) if Stream(1, 256) in known else None


def _most_rows(product: Product) -> int:
    """Beyond how many rows the library is faster.

    The gate saves the library's product a kernel; layers of many outputs need no second block for each tile.
    """
    if product.op == "norm_gated_linear":
        return 128
    return 64 if product.outputs >= 16384 else 32


def choose(choices: Choices, product: Product, num_rows: int, pair: int | None, num_multiprocessors: int) -> Cut:
    """What was measured, if the kernels can do it, else the rule."""
    default = rule(product, num_rows, pair, num_multiprocessors)
    found = find(choices, product, num_rows, as_choice(default))
    return next((cut for cut in possible(product, num_rows, pair) if as_choice(cut) == found), default)


def as_choice(cut: Cut) -> Choice:
    """As a table of measured choices holds it."""
    return None if cut is None else asdict(cut)
