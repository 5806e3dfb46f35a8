"""`plexor explain`: how a model would be run, kernel by kernel and byte by byte, before a weight is read."""

from __future__ import annotations

import argparse

from plexor.cli.options import add_model_options, engine_config, human_bytes
from plexor.extension.catalog import Catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", metavar="MODEL", help="a checkpoint folder or a shipped checkpoint's name")
    add_model_options(parser)


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    from plexor.cli.tables import print_choices
    from plexor.runtime.ledger import make_plan
    from plexor.runtime.loading import find_layout, settle_precision
    from plexor.runtime.prompts import find_folder

    arguments.model = arguments.path or arguments.model
    asked = engine_config(arguments)
    folder = find_folder(asked, catalog)
    layout = find_layout(folder, catalog)
    config = settle_precision(asked, catalog, folder)
    plan = make_plan(config, catalog, folder)
    owner = catalog.owner("architectures", folder.architecture)
    print(
        f"{folder.path}: {folder.architecture}, served by plugin {owner.name!r} ({owner.distribution} {owner.version})"
    )
    print(
        f"runs on {plan.device_name} in {plan.dtype}, precision {config.precision}, KV {config.kv}, "
        f"ranks {config.tensor_parallel}"
    )
    precision = catalog.precision(config.precision)
    print(f"{precision.name}: {precision.summary}{f'; {precision.needs}' if precision.needs else ''}")
    if layout is not None:
        why = "chosen to keep them" if asked.precision == "auto" else "asked for"
        print(f"weights are stored quantised in the layout {layout.name}; precision {config.precision} was {why}")
        print(f"linear layers: {'; '.join(f'{count} {text}' for text, count in plan.formats)}")
    print(f"context {plan.max_length:,}, vocabulary {plan.vocab_size:,}\n")
    print_choices(plan.choices)
    print("\nmemory of one rank")
    for line in plan.lines:
        print(f"    {line.name:<14} {human_bytes(line.num_bytes):>12}  {line.note}")
    print(plan.verdict)
    return 0
