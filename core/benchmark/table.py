"""Prints the figures of a file as Markdown: `python -m plexor.benchmark.table bench/results/latest.json`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from plexor.benchmark.report import markdown_table, read_figures
from plexor.errors import PlexorError

INTRODUCTION = """# Measured figures

Each stands beside the limit of its device, measured in the same run: `docs/benchmark.md` says how. Written by
`python -m plexor.benchmark.table bench/results/latest.json`.
"""


def main(argv: Sequence[str]) -> int:
    """argv: one file that `plexor bench --json` wrote."""
    if len(argv) != 1:
        print("usage: python -m plexor.benchmark.table FILE", file=sys.stderr)
        return 2
    try:
        figures = read_figures(Path(argv[0]))
    except PlexorError as error:
        print(error, file=sys.stderr)
        return 2
    if not figures:
        print(f"{argv[0]} holds no figures: write some with `plexor bench --json {argv[0]}`", file=sys.stderr)
        return 2
    print(INTRODUCTION)
    print(markdown_table(figures), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
