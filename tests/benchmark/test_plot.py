"""The picture of a run, as far as a test can look at one."""

from pathlib import Path

import pytest
from matplotlib.image import imread
from tests.benchmark.test_report import ONE, changed

from plexor.benchmark import plot
from plexor.benchmark.plot import check_plotting, plot_figures
from plexor.errors import ConfigError


def test_a_picture_has_a_bar_for_each_figure_with_a_limit(tmp_path: Path) -> None:
    check_plotting()
    few, more = tmp_path / "few.png", tmp_path / "more.png"
    plot_figures([ONE, changed(workload="start", limit=None)], "a title", few)
    plot_figures([ONE, changed(metric="b"), changed(metric="c")], "a title", more)
    assert imread(more).shape[0] > imread(few).shape[0]
    assert imread(few)[..., :3].std() > 0


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        plot_figures([ONE], "a title", tmp_path / "nowhere" / "run.png")
    with pytest.raises(ConfigError, match="check the folder and the ending"):
        plot_figures([ONE], "a title", tmp_path / "run.nothing")


def test_without_matplotlib_the_mend_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--plot needs matplotlib: run `pip install 'plexor\[plots\]'`"):
        check_plotting()
