"""What the known plugins offer, so that an error can name the pip command for one that is not installed.

The facts are data (`index.json`), written from the plugins themselves: `python -m plexor.extension.index DISTRIBUTION…`
rewrites it from what these installed distributions contribute, and a test holds it to them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plexor.errors import PluginError

if TYPE_CHECKING:
    from plexor.extension.host import PluginReport

Index = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Distribution to hook to the keys that it offers."""

INDEX_FILE = Path(__file__).with_name("index.json")
INDEXED_HOOKS = (
    "architectures",
    "layers",
    "ops",
    "precisions",
    "kv_formats",
    "checkpoint_formats",
    "stored_weights",
    "input_processors",
    "checkpoints",
)


def read_index() -> Index:
    """The index that is shipped with the core."""
    loaded = json.loads(INDEX_FILE.read_text(encoding="utf-8"))
    return {name: {hook: tuple(keys) for hook, keys in offers.items()} for name, offers in loaded.items()}


def build_index(reports: Iterable[PluginReport], distributions: Iterable[str]) -> Index:
    """The index of these distributions; PluginError when one of them is not loaded."""
    loaded = {report.distribution: report for report in reports if report.state == "loaded"}
    index = {}
    for distribution in sorted(distributions):
        if distribution not in loaded:
            raise PluginError(f"{distribution} is not installed or not loaded: see `plexor plugins`")
        offers = loaded[distribution].offers
        index[distribution] = {hook: tuple(sorted(offers[hook])) for hook in INDEXED_HOOKS if offers.get(hook)}
    return index


def offering(index: Index, hook: str, key: str) -> tuple[str, ...]:
    """The known distributions that bring this key."""
    return tuple(name for name, offers in index.items() if key in offers.get(hook, ()))


def known_keys(index: Index, hook: str) -> tuple[str, ...]:
    """Every key of a hook that some known distribution brings."""
    return tuple(key for offers in index.values() for key in offers.get(hook, ()))


def main(distributions: list[str]) -> int:
    """Write index.json from what these distributions contribute where this runs."""
    from plexor.extension.host import Host

    index = build_index(Host.load(strict=True, allow=None).reports, distributions)
    INDEX_FILE.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
