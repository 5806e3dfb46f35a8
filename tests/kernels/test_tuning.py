"""Measured choices are found again for the rows that they serve, and a damaged file costs no more than a warning."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from plexor.errors import ConfigError
from plexor.kernels import tuning
from plexor.kernels.tuning import Product, file_name, find, read_choices, tuned, write_choices

PRODUCT = Product("linear", 96, 64, "bfloat16")
NARROW, WIDE = {"blocks": 2, "depth": 512}, {"split": 2}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where choices come with Plexor, and the user's own."""
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    monkeypatch.setattr(tuning, "shipped_folder", lambda: shipped)
    monkeypatch.setattr(tuning, "user_folder", lambda: own)
    tuned.cache_clear()
    return shipped, own


def test_the_next_larger_measured_number_of_rows_counts() -> None:
    choices = {str(PRODUCT): {32: NARROW, 128: WIDE, 256: None}}
    found = [find(choices, PRODUCT, rows, default={}) for rows in (1, 32, 33, 128, 129)]
    assert found == [NARROW, NARROW, WIDE, WIDE, None]
    assert find(choices, PRODUCT, 257, default=None) is None
    assert find(choices, PRODUCT, 257, default=WIDE) == WIDE
    assert find(choices, PRODUCT, 200, default=WIDE) is None, "the library was measured to be fastest"
    assert find(choices, Product("linear", 96, 64, "float16"), 32, default=WIDE) == WIDE


def test_what_is_written_is_read_again_and_merged(tmp_path: Path) -> None:
    path = tmp_path / "new" / file_name("Some GPU (12 GB)")
    assert path.name == "Some_GPU__12_GB_.json"
    write_choices(path, {str(PRODUCT): {64: None, 24: NARROW}, "kept": {1: WIDE}})
    write_choices(path, {str(PRODUCT): {32: WIDE}})
    assert read_choices(path) == {str(PRODUCT): {32: WIDE}, "kept": {1: WIDE}}
    assert read_choices(tmp_path / "absent.json") == {}


def test_the_users_choices_go_before_those_that_are_shipped(folders: tuple[Path, Path]) -> None:
    shipped, own = folders
    write_choices(shipped / "GPU.json", {str(PRODUCT): {32: NARROW}, "other": {8: NARROW}})
    write_choices(own / "GPU.json", {str(PRODUCT): {32: WIDE}})
    assert tuned("GPU") == {str(PRODUCT): {32: WIDE}, "other": {8: NARROW}}
    assert tuned("another GPU") == {}


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}', '{"a": {"x": null}}', '{"a": {"1": {"split": "2"}}}'])
def test_a_damaged_file_counts_as_none(folders: tuple[Path, Path], text: str, caplog: pytest.LogCaptureFixture) -> None:
    shipped, own = folders
    write_choices(shipped / "GPU.json", {str(PRODUCT): {32: NARROW}})
    own.mkdir()
    (own / "GPU.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert tuned("GPU") == {str(PRODUCT): {32: NARROW}}
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert "plexor tune" in caplog.text
    with pytest.raises(ConfigError, match="delete it, or measure again"):
        read_choices(own / "GPU.json")
    write_choices(own / "GPU.json", {"new": {4: None}})
    assert json.loads((own / "GPU.json").read_text()) == {"new": {"4": None}}


def test_what_is_shipped_can_be_read() -> None:
    for path in tuning.shipped_folder().glob("*.json"):
        assert read_choices(path)
