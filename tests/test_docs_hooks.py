"""docs/hooks.md says what hookspecs.py and specs.py say, and its examples are plugins that load."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from plexor.extension import hookspecs, host
from plexor.extension.claims import KEYS

ROOT = Path(__file__).parents[1]
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "hooks.md").read_text(), re.M | re.S))
SPECS = {
    node.name: node
    for node in ast.parse(Path(str(hookspecs.__file__)).read_text()).body
    if isinstance(node, ast.FunctionDef)
}


def blocks(section: str) -> list[str]:
    """The Python blocks of a section: the signature, then the example."""
    return re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)


@pytest.fixture
def load_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], host.Host]]:
    """A function that loads a section's example as the only installed plugin."""
    name = "example_of_the_documentation"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(host, "entry_points", lambda group: [EntryPoint("stone", name, group)])

    def load(section: str) -> host.Host:
        (tmp_path / f"{name}.py").write_text(blocks(section)[1])
        return host.Host.load(strict=True, allow=None)

    yield load
    sys.modules.pop(name, None)


def test_each_hook_has_a_section_and_each_section_a_hook() -> None:
    assert list(SECTIONS) == list(SPECS)


@pytest.mark.parametrize("hook", SPECS)
def test_the_signature_is_the_one_in_the_code(hook: str) -> None:
    node = SPECS[hook]
    signature = f"def {hook}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"  # type: ignore[arg-type]
    assert blocks(hook)[0].strip() == signature


@pytest.mark.parametrize("hook", KEYS)
def test_each_field_of_a_spec_is_explained_and_no_other(hook: str) -> None:
    explained = re.findall(r"^- `(\w+)`:", SECTIONS[hook], re.M)
    assert explained == [field.name for field in dataclasses.fields(KEYS[hook][0])]


@pytest.mark.parametrize("hook", KEYS)
def test_the_key_is_the_one_that_the_host_uses(hook: str) -> None:
    assert re.search(rf"Key:\s`{'/'.join(KEYS[hook][1])}`", SECTIONS[hook])


@pytest.mark.parametrize("hook", SPECS)
def test_the_example_is_a_plugin_that_loads(hook: str, load_example: Callable[[str], host.Host]) -> None:
    report = load_example(hook).reports[1]
    assert (report.name, report.state) == ("stone", "loaded")
    assert hook in report.offers
    assert bool(report.offers[hook]) is (hook in KEYS)
