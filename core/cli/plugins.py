"""`plexor plugins`: every plugin with its state, what it offers, and why it does not work."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from plexor.extension.catalog import Catalog
from plexor.extension.host import PluginReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    if arguments.json:
        print(json.dumps([{**asdict(report), "offers": dict(report.offers)} for report in catalog.reports], indent=2))
        return 0
    for report in catalog.reports:
        _describe(report)
    return 0


def _describe(report: PluginReport) -> None:
    print(f"{report.name:<10} {report.state:<9} {report.distribution} {report.version}")
    if report.reason:
        print(f"{'':<10} {report.reason}")
    for hook, keys in report.offers.items():
        print(f"{'':<10} {hook}: {', '.join(keys)}")
