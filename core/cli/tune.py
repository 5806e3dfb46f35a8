"""`plexor tune`: measure which kernels multiply a model's layers fastest on this GPU, and remember it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plexor.cli.options import add_model_options, engine_config
from plexor.config import EngineConfig
from plexor.errors import ConfigError
from plexor.extension.catalog import Catalog

if TYPE_CHECKING:
    from plexor.kernels.tuning import Choice


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
    """Measure every product of the model that has variants, and merge the choices into the user's file for this GPU."""
    import torch

    from plexor.kernels import tuning

    choices = measure(config, catalog)
    path = tuning.user_folder() / tuning.file_name(torch.cuda.get_device_name())
    tuning.write_choices(path, choices)
    print(f"remembered {len(choices)} products in {path}")
    return 0


def measure(config: EngineConfig, catalog: Catalog) -> dict[str, dict[int, Choice]]:
    """The quickest choices for the model's products, each printed as it is found; ConfigError if it has none."""
    import torch

    from plexor.kernels.measure import ROWS, chains_of, choices_of, tune
    from plexor.runtime.ledger import make_plan
    from plexor.runtime.loading import settle_precision
    from plexor.runtime.prompts import find_folder

    folder = find_folder(config, catalog)
    config = settle_precision(config, catalog, folder)
    chains = chains_of(make_plan(config, catalog, folder).choices)
    if not chains:
        raise ConfigError(
            f"precision {config.precision} multiplies no layer of this model with kernels that have variants to "
            "measure: they serve bfloat16 and float16 on GPUs of compute capability 9.0"
        )
    results = []
    for chain in chains:
        for tuned in tune(chain, ROWS, torch.device("cuda", torch.cuda.current_device())):
            print(tuned, flush=True)
            results.append(tuned)
    return choices_of(results)
