"""Measures how products of a decode step are best cut on a GPU: `python bench/linear.py [--write]`.

As `plexor tune`, for several published shapes one after the other; core/kernels/tuned holds what `--write` writes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from plexor import EngineConfig
from plexor.benchmark.shape import shape_folder
from plexor.cli.tune import measure
from plexor.extension.catalog import Catalog
from plexor.kernels.tuning import Choice, file_name, shipped_folder, write_choices

SHAPES = ("bench/shapes/llama-3.1-8b.json", "bench/shapes/llama-3.2-1b.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="FILE", help="config.json of published shapes")
    parser.add_argument("--write", action="store_true", help="merge the choices into the file that comes with Plexor")
    arguments = parser.parse_args()
    catalog = Catalog.load()
    choices: dict[str, dict[int, Choice]] = {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds of a layer's products")
    for shape in arguments.shape:
        started = time.perf_counter()
        with shape_folder(Path(shape)) as folder:
            choices |= measure(EngineConfig(model=str(folder), device="cuda"), catalog)
        print(f"{shape}: {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.write:
        path = shipped_folder() / file_name(torch.cuda.get_device_name())
        write_choices(path, choices)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
