"""Figures, the file that keeps them, and the tables."""

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from plexor.benchmark.report import Figure, markdown_table, merge_figures, read_figures, terminal_table, write_figures
from plexor.errors import ConfigError

ONE = Figure(
    shape="any-1b",
    precision="dense",
    kv="dense",
    gpus=1,
    workload="decode_bs1",
    metric="time per token",
    value=4.0,
    unit="ms",
    limit=3.0,
    gpu="GPU of a kind",
    date="2026-11-22",
    commit="abc1234",
)


def changed(**fields: object) -> Figure:
    return msgspec.structs.replace(ONE, **fields)


def test_a_share_says_how_much_of_the_limit_is_reached() -> None:
    assert ONE.share == 0.75
    assert changed(unit="tok/s", value=3.0, limit=4.0).share == 0.75
    assert changed(unit="GiB", value=3.0, limit=4.0).share == 0.75
    assert changed(limit=None).share is None


def test_a_figure_replaces_the_one_of_its_key_where_that_stood() -> None:
    others = [changed(**{field: value}) for field, value in (("kv", "x"), ("gpus", 2), ("metric", "y"))]
    again = changed(value=3.5, commit="def5678", date="2026-11-23")
    assert merge_figures([ONE, *others], [again]) == [again, *others]


def test_a_file_keeps_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert read_figures(file) == []
    write_figures(file, [ONE])
    write_figures(file, [changed(workload="prefill_8k", limit=None)])
    assert read_figures(file) == [ONE, changed(workload="prefill_8k", limit=None)]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text('{"no": "list"}')
    with pytest.raises(ConfigError, match="is no file of benchmark figures"):
        write_figures(file, [ONE])
    with pytest.raises(ConfigError, match=r"cannot be written \(No such file or directory\): check the path"):
        write_figures(tmp_path / "nowhere" / "figures.json", [ONE])


def test_the_markdown_has_a_table_for_each_run() -> None:
    text = markdown_table([ONE, changed(gpus=0, gpu="CPU"), changed(metric="tokens out", unit="tok/s", value=12345.0)])
    assert text.count("## ") == 2
    assert "## any-1b, precision dense, KV dense, 1 x GPU of a kind" in text
    assert "## any-1b, precision dense, KV dense, CPU" in text
    assert "| decode_bs1 | time per token | 4.00 | ms | 3.00 | 75% | 2026-11-22 | abc1234 |" in text
    assert "| decode_bs1 | tokens out | 12,345 | tok/s | 3.00 | 411500% |" in text


def test_the_terminal_names_a_workload_once() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal_table([ONE, changed(metric="tokens out", limit=None), changed(workload="start")]))
    text = console.export_text()
    assert text.count("decode_bs1") == 1
    assert all(said in text for said in ("time per token", "tokens out", "4.00", "75%", "start"))
