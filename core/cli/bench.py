"""`plexor bench`: how fast a model runs here, each figure beside the limit of the device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plexor.benchmark.workloads import DEFAULT, Workload, parse_workloads
from plexor.cli.options import add_model_options, count, engine_config
from plexor.config import EngineConfig
from plexor.errors import ConfigError
from plexor.extension.catalog import Catalog
from plexor.runtime.startup import import_engine

if TYPE_CHECKING:
    from plexor.benchmark.report import Figure
    from plexor.benchmark.run import Limits, Measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--shape", metavar="FILE", help="a config.json: run this shape with random weights")
    group.add_argument(
        "--workloads",
        default=DEFAULT,
        metavar="NAMES",
        help=f"with commas between: start, decode_bsN, prefill_Nk, serve_IN_OUT (default: {DEFAULT})",
    )
    group.add_argument(
        "--repeats", type=count, metavar="N", help="runs of which the median counts (default: 3, of serve workloads 1)"
    )
    group.add_argument("--json", metavar="FILE", help="merge the figures into this file")
    group.add_argument("--plot", metavar="FILE", help="draw how much of its limit each figure reaches")
    group.add_argument("--profile", metavar="DIR", help="write a trace of a few steps of the first workload, summed up")
    group.add_argument("--commit", metavar="NAME", help="what to say was run (default: the checkout's commit)")
    add_model_options(parser)


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    from plexor.benchmark.plot import check_plotting, plot_figures
    from plexor.benchmark.report import read_figures, write_figures

    workloads = parse_workloads(arguments.workloads)
    if arguments.plot:
        check_plotting()
    if arguments.profile and all(workload.kind == "start" for workload in workloads):
        raise ConfigError("--profile needs a workload that runs more than once: name one, such as decode_bs1")
    for given in (arguments.json, arguments.plot):
        if given and not Path(given).parent.is_dir():
            raise ConfigError(f"{given} cannot be written, for there is no folder {Path(given).parent}: make it first")
    if arguments.json:
        read_figures(Path(arguments.json))
    figures = _measure(arguments, catalog, workloads)
    if arguments.json:
        write_figures(Path(arguments.json), figures)
    if arguments.plot:
        plot_figures(figures, _title(figures[0]), Path(arguments.plot))
    return 0


def _measure(arguments: argparse.Namespace, catalog: Catalog, workloads: tuple[Workload, ...]) -> list[Figure]:
    import_engine(arguments.device)
    from plexor.benchmark.run import find_limits, make_figures, make_labels
    from plexor.runtime.loading import choose_device, settle_precision
    from plexor.runtime.prompts import find_folder

    with _folder(arguments) as config:
        folder = find_folder(config, catalog)
        config = settle_precision(config, catalog, folder)
        measured = _run_engine(arguments, config, catalog, workloads)
        limits = find_limits(config, catalog, folder, tuple(measured.timings), _say)
        labels = make_labels(folder.path.name, config, choose_device(config.device), limits.plan, arguments.commit)
    figures = make_figures(measured, limits, labels)
    _print(figures, limits)
    return figures


def _run_engine(
    arguments: argparse.Namespace, config: EngineConfig, catalog: Catalog, workloads: tuple[Workload, ...]
) -> Measured:
    """In a function of its own, so that nothing holds the engine's memory afterwards."""
    from plexor.benchmark.run import measure, profile_steps
    from plexor.cli.session import open_engine

    with open_engine(config, catalog) as (engine, _):
        measured = measure(engine, workloads, arguments.repeats, _say)
        repeatable = [workload for workload in measured.timings if workload.kind != "start"]
        if arguments.profile and repeatable:
            print(f"a few steps of {repeatable[0].name}:")
            for line in profile_steps(engine, repeatable[0], Path(arguments.profile)).lines():
                print(f"    {line}")
    return measured


@contextmanager
def _folder(arguments: argparse.Namespace) -> Iterator[EngineConfig]:
    """The config of what is run: a checkpoint as it is, or a shape filled with random weights."""
    config = engine_config(arguments)
    if arguments.shape is None:
        yield config
        return
    if arguments.model is not None:
        raise ConfigError("both --shape and --model are given: name what is to be run with one of them")

    from plexor.benchmark.shape import shape_folder

    with shape_folder(Path(arguments.shape).expanduser()) as folder:
        yield replace(config, model=str(folder), weights="random")


def _print(figures: list[Figure], limits: Limits) -> None:
    from rich.console import Console

    from plexor.benchmark.report import terminal_table

    print(f"{_title(figures[0])}\n{limits.plan.dtype} activations; limits measured in this run: {limits.rates}")
    Console(soft_wrap=True).print(terminal_table(figures))


def _title(figure: Figure) -> str:
    where = f"{figure.gpus} x {figure.gpu}" if figure.gpus else figure.gpu
    return f"{figure.shape}, precision {figure.precision}, KV {figure.kv}, {where}, {figure.date}, {figure.commit}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
