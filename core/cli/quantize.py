"""`plexor quantize`: write a checkpoint whose weights are rounded, with or without a text in view."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from plexor.cli.generate import read_text
from plexor.cli.options import count, human_bytes
from plexor.config import EngineConfig
from plexor.extension.catalog import Catalog

if TYPE_CHECKING:
    from plexor.runtime.conversion import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR|NAME", help="a checkpoint folder, or one that a plugin ships")
    parser.add_argument("--precision", required=True, help="number format to write")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="the folder to write, new or empty")
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="a text like what the model will see, in UTF-8 (default: plain rounding)",
    )
    parser.add_argument(
        "--dense", action="append", default=[], metavar="PATTERN", help="layers to leave dense, such as '*.down_proj'"
    )
    parser.add_argument(
        "--windows", type=count, default=64, metavar="N", help="pieces of the text to use at most (default: 64)"
    )
    parser.add_argument(
        "--window", type=count, default=512, metavar="N", help="tokens in a piece, the context at most (default: 512)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16 or float16: what it will run in (default: the stated)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    from plexor.checkpoint.folder import open_folder
    from plexor.runtime.conversion import Conversion, convert

    checked = EngineConfig(dtype=arguments.dtype, device=arguments.device)
    conversion = Conversion(
        folder=open_folder(catalog.resolve_model(arguments.model)),
        precision=arguments.precision,
        out=Path(arguments.out).expanduser(),
        device=checked.device,
        dtype=checked.dtype,
        text=None if arguments.calibrate is None else read_text(arguments.calibrate),
        dense=tuple(arguments.dense),
        windows=arguments.windows,
        window=arguments.window,
    )
    started = time.perf_counter()
    with _layers_bar() as progress:
        report = convert(conversion, catalog, progress)
    print(
        f"wrote {conversion.out}: {human_bytes(report.num_bytes)} of tensors, {report.num_rounded} weights in "
        f"{arguments.precision}, {len(report.ignored)} layers dense, in {time.perf_counter() - started:.1f} s"
    )
    return 0


@contextmanager
def _layers_bar() -> Iterator[Progress | None]:
    """A bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("rounding layers"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )
    with bar:
        task = bar.add_task("rounding", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
