"""Plugins as pip leaves them: a module and a dist-info folder on the import path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from textwrap import dedent

import pytest

from plexor.extension import host


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that installs a plugin; only what it installs is found, whatever else is there where tests run."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    modules: list[str] = []

    def add(
        name: str,
        source: str,
        distribution: str | None = None,
        version: str = "1.0",
        requires: tuple[str, ...] = ("plexor>=0.1,<0.2",),
    ) -> None:
        owner = distribution or f"plexor-{name}"
        module = f"installed_{owner.replace('-', '_')}"
        modules.append(module)
        (folder / f"{module}.py").write_text(dedent(source))
        info = folder / f"{owner.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {owner}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(f"[plexor]\n{name} = {module}\n")

    def entry_points(group: str) -> list[EntryPoint]:
        found = [entry for item in distributions(path=[str(folder)]) for entry in item.entry_points]
        return [entry for entry in found if entry.group == group]

    monkeypatch.setattr(host, "entry_points", entry_points)
    monkeypatch.delenv("PLEXOR_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(folder))
    yield add
    for module in modules:
        sys.modules.pop(module, None)
