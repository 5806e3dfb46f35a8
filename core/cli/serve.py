"""`plexor serve`: answer over HTTP, as the OpenAI API does, until a signal comes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from plexor.cli.options import add_model_options, engine_config
from plexor.errors import ConfigError
from plexor.extension.catalog import Catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    group.add_argument("--served-model-name", metavar="NAME", help="what requests call the model")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="wanted as a bearer token; may be given again"
    )
    group.add_argument(
        "--max-waiting", type=_not_negative, default=1024, metavar="N", help="answers that may wait (default: 1024)"
    )
    group.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds that requests may run on after a signal (default: 30)",
    )
    group.add_argument(
        "--max-body", type=_not_negative, default=64, metavar="MIB", help="largest body of a request (default: 64)"
    )
    group.add_argument(
        "--max-images", type=_not_negative, default=16, metavar="N", help="pictures in one request (default: 16)"
    )
    group.add_argument(
        "--no-warm-up", action="store_true", help="compile and capture with the first requests, not before them"
    )
    group.add_argument(
        "--enable-routes", action="append", default=[], metavar="PLUGIN", help="let a plugin add its HTTP routes"
    )


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    try:
        from plexor.server.http import ServerSettings
        from plexor.server.run import Address, run_server
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: run `pip install 'plexor[serve]'`") from error

    if not all(arguments.api_key):
        raise ConfigError("--api-key is empty: give a key, or leave the option out to serve everybody")
    settings = ServerSettings(
        model_name=arguments.served_model_name or _model_name(arguments.model, catalog),
        api_keys=tuple(arguments.api_key),
        max_waiting=arguments.max_waiting,
        max_body=arguments.max_body * 1024 * 1024,
        max_images=arguments.max_images,
        enable_routes=tuple(arguments.enable_routes),
    )
    address = Address(host=arguments.host, port=arguments.port, shutdown_seconds=arguments.shutdown_timeout)
    config = replace(engine_config(arguments), warm_up=not arguments.no_warm_up)
    return run_server(config, catalog, settings, address, _Bar())


class _Bar:
    """Progress of loading, one line that is written over, at a terminal only."""

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rloading weights: {done / max(total, 1):.0%}", end=end, file=sys.stderr, flush=True)


def _model_name(model: str | None, catalog: Catalog) -> str:
    """A shipped checkpoint's name, or that of the folder."""
    if model is None:
        return catalog.default_checkpoint().name
    return model if model in catalog.checkpoints else Path(model).expanduser().resolve().name


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{value} must lie between 0 and {(1 << 16) - 1}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} must be a number of seconds from 0")
    return value
