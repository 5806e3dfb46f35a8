"""The Markdown of a file of figures, and that the repository's own is up to date."""

from pathlib import Path

import pytest
from tests.benchmark.test_report import ONE

from plexor.benchmark.report import write_figures
from plexor.benchmark.table import main

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def test_a_file_becomes_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_figures(tmp_path / "figures.json", [ONE])
    assert main([str(tmp_path / "figures.json")]) == 0
    assert "| decode_bs1 | time per token | 4.00 |" in capsys.readouterr().out


def test_what_is_no_file_of_figures_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main([str(tmp_path / "nothing.json")]) == 2
    assert "holds no figures: write some with `plexor bench --json" in capsys.readouterr().err


def test_the_repository_shows_the_figures_that_it_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RESULTS / "latest.json")]) == 0
    shown = (RESULTS / "latest.md").read_text()
    assert capsys.readouterr().out == shown, (
        "run: python -m plexor.benchmark.table bench/results/latest.json > bench/results/latest.md"
    )
