"""`plexor tune`: measure which kernels multiply a model's layers fastest on this GPU, and remember it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plexor.cli.options import add_model_options, engine_config
from plexor.config import EngineConfig
from plexor.errors import ConfigError
from plexor.extension.catalog import Catalog

if TYPE_CHECKING:
    from plexor.kernels.table import Choice
    from plexor.kernels.tuning import Product

PRODUCTS = {
    "linear": "linear",
    "norm_linear": "linear",
    "linear_add": "linear",
    "norm_rotary_linear": "linear",
    "norm_gated_linear": "gated_linear",
}
"""The measured product that each op's kernels multiply with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", metavar="FILE", help="a config.json: the layers of this shape, without a checkpoint")
    add_model_options(parser)


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    import torch

    config = engine_config(arguments)
    if not torch.cuda.is_available():
        raise ConfigError("tune measures kernels of a GPU and finds none here: run it where the model is to run")
    if arguments.shape is None:
        return tune(config, catalog)
    if arguments.model is not None:
        raise ConfigError("both --shape and --model are given: name what is to be measured with one of them")

    from plexor.benchmark.shape import shape_folder

    with shape_folder(Path(arguments.shape).expanduser()) as folder:
        return tune(replace(config, model=str(folder)), catalog)


def tune(config: EngineConfig, catalog: Catalog) -> int:
    """Measure every dense layer of the model and merge the choices into the user's file for this GPU."""
    import torch

    from plexor.kernels import tuning
    from plexor.kernels.measure import ROWS, measure
    from plexor.runtime.ledger import make_plan
    from plexor.runtime.prompts import find_folder

    products = products_of(make_plan(config, catalog, find_folder(config, catalog)).choices)
    if not products:
        raise ConfigError(
            f"precision {config.precision} multiplies no layer of this model in bfloat16 or float16: choose another one"
        )
    path = tuning.user_folder() / tuning.file_name(torch.cuda.get_device_name())
    measured: dict[str, dict[int, tuning.Choice]] = {}
    for timing in measure(products, ROWS, torch.device("cuda")):
        measured.setdefault(str(timing.product), {})[timing.num_rows] = timing.choice
        fastest = min(timing.library, timing.variants[timing.best])
        print(
            f"{timing.product}, {timing.num_rows} rows: library {timing.library * 1e6:.1f} us, best variant "
            f"{timing.variants[timing.best] * 1e6:.1f} us; {timing.bandwidth(fastest) / 1e12:.2f} TB/s",
            flush=True,
        )
    tuning.write_choices(path, measured)
    print(f"remembered {len(measured)} layers in {path}")
    return 0


def products_of(choices: Iterable[Choice]) -> tuple[Product, ...]:
    """Each size of a dense product in half precision among the ops that a model binds, once."""
    from plexor.kernels.tuning import Product

    found = {
        Product(PRODUCTS[choice.op], shape["out_features"], shape["in_features"], choice.facts.dtype): None
        for choice in choices
        if choice.op in PRODUCTS and choice.facts.dtype in ("bfloat16", "float16")
        for shape in [choice.facts.shape]
        if shape["in_features"] % 8 == 0
    }
    return tuple(found)
