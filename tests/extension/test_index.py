"""The index of known plugins is what these plugins really offer."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from plexor.errors import PluginError
from plexor.extension.host import Host, PluginReport
from plexor.extension.index import build_index, read_index

PLUGINS = Path(__file__).parents[2] / "plugins"


def test_the_shipped_index_is_what_the_plugins_offer() -> None:
    names = [tomllib.loads(path.read_text())["project"]["name"] for path in sorted(PLUGINS.glob("*/pyproject.toml"))]
    reports = Host.load(strict=True, allow=None).reports
    assert read_index() == build_index(reports, names), "run `make index`"


def test_an_index_is_not_built_from_what_is_not_loaded() -> None:
    report = PluginReport("stone", "plexor-stone", "1.0", "broken", "reason", {"architectures": ("GraniteModel",)})
    with pytest.raises(PluginError, match="plexor-stone is not installed or not loaded"):
        build_index([report], ["plexor-stone"])
