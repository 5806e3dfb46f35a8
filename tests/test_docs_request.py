"""docs/request.md names files and names in them: all of them must exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "request.md").read_text()
MENTION = re.compile(r"`(core/[\w/]+\.py)`:\s+((?:`\w+`(?:,\s+)?)+)")


def mentions() -> list[tuple[str, str]]:
    return [(file, name) for file, names in MENTION.findall(TEXT) for name in re.findall(r"`(\w+)`", names)]


def test_every_step_names_code() -> None:
    steps = re.split(r"^\d+\. ", TEXT, flags=re.MULTILINE)[1:]
    assert len(steps) == 11
    assert all(MENTION.search(step) for step in steps)


@pytest.mark.parametrize(("file", "name"), mentions(), ids=lambda value: str(value))
def test_names_exist(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    defined = {
        node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert name in defined, f"{file} defines no {name}"


def test_every_mentioned_file_is_matched() -> None:
    """A file named without names after it would escape the check."""
    assert set(re.findall(r"`(core/[\w/]+\.py)`", TEXT)) == {file for file, _ in mentions()}
