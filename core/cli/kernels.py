"""`plexor kernels`: each operation, its providers, and which one wins on this machine."""

from __future__ import annotations

import argparse

from plexor.cli.options import kernel_overrides
from plexor.extension.catalog import Catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bfloat16", help="of activations and cache (default: bfloat16)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--kernel", action="append", default=[], metavar="OP=PROVIDER", help="override a choice")


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    from plexor.cli.tables import print_choices
    from plexor.model.build import facts
    from plexor.runtime.loading import choose_device, choose_dtype

    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, {"dtype": "bfloat16"})
    table = catalog.kernel_table(kernel_overrides(arguments.kernel))
    print(f"on {device}, {str(dtype).removeprefix('torch.')}; sizes that a kernel refuses show in `plexor explain`")
    print_choices([table.explain(op, facts(device, dtype)) for op in table.ops])
    return 0
