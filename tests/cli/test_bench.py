"""`plexor bench` as its user sees it: the table, the files it writes, and one-sentence errors."""

import json
from pathlib import Path

import pytest
from tests.cli.test_commands import run

from plexor.benchmark import limits, workloads
from plexor.benchmark.limits import Sizes

SMALL = ["--device", "cpu", "--num-blocks", "16", "--max-sequences", "4", "--repeats", "1"]
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 301,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workloads and limits that a test has time for."""
    monkeypatch.setattr(workloads, "DECODE_PROMPT", 12)
    monkeypatch.setattr(workloads, "DECODE_TOKENS", 6)
    monkeypatch.setattr(workloads, "SERVE_REQUESTS", 5)
    monkeypatch.setattr(limits, "ON_CPU", Sizes(read_bytes=1 << 16, width=16, tokens=16, calls=1))


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    file = tmp_path / "some-1b.json"
    file.write_text(json.dumps(SHAPE))
    return file


def test_a_shape_is_measured_beside_its_limits(shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    names = "decode_bs2,serve_20_4,start,prefill_1k"
    outputs = ("--json", str(file), "--plot", str(picture), "--commit", "abc")
    code, out, err = run(capsys, "bench", "--shape", str(shape), "--workloads", names, *outputs, *SMALL)
    assert code == 0, err
    assert "some-1b, precision dense, KV dense, CPU (" in out
    assert "float32 activations; limits measured in this run: reading " in out
    assert "prefill_1k is left out: a request has 1,025 tokens and the context 64" in err
    figures = json.loads(file.read_text())
    assert [(figure["workload"], figure["metric"], figure["unit"]) for figure in figures] == [
        ("start", "time to first token", "s"),
        ("decode_bs2", "time per token", "ms"),
        ("decode_bs2", "time to first token", "ms"),
        ("decode_bs2", "tokens out", "tok/s"),
        ("serve_20_4", "tokens in and out", "tok/s"),
        ("serve_20_4", "tokens out", "tok/s"),
        ("all", "peak memory", "GiB"),
    ]
    assert all(figure["value"] > 0 and (figure["limit"] or 1) > 0 for figure in figures)
    assert {(figure["shape"], figure["gpus"], figure["commit"]) for figure in figures} == {("some-1b", 0, "abc")}
    assert picture.stat().st_size > 1000


def test_a_time_per_token_is_the_time_over_the_tokens(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    names = ("--workloads", "decode_bs3")
    run(capsys, "bench", "--model", str(tiny), *names, "--json", str(file), *SMALL)
    values = {figure["metric"]: figure["value"] for figure in json.loads(file.read_text())}
    assert values["tokens out"] == pytest.approx(3 * 1000 / values["time per token"])
    assert values["time to first token"] < 6 * values["time per token"]


def test_a_later_run_replaces_its_figures_only(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    for name, commit in (("decode_bs1", "first"), ("decode_bs2", "first"), ("decode_bs1", "second")):
        names = ("--workloads", name, "--commit", commit)
        run(capsys, "bench", "--model", str(tiny), *names, "--json", str(file), *SMALL)
    commits = {figure["workload"]: figure["commit"] for figure in json.loads(file.read_text())}
    assert commits == {"decode_bs1": "second", "decode_bs2": "first", "all": "second"}


def test_a_profile_leaves_a_trace_and_its_summary(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep" / "profile"
    names = ("--workloads", "start,decode_bs2", "--profile", str(folder))
    code, out, _ = run(capsys, "bench", "--model", str(tiny), *names, *SMALL)
    assert code == 0
    assert "a few steps of decode_bs2:\n    the trace holds no GPU kernels" in out
    assert (folder / "decode_bs2.txt").read_text() == "the trace holds no GPU kernels\n"
    assert json.loads((folder / "decode_bs2.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--workloads", "decode_8"), "there is no workload 'decode_8': did you mean 'decode_bs8'?"),
        (("--shape", "x.json", "--model", "y"), "both --shape and --model are given"),
        (("--shape", "nowhere.json"), "--shape nowhere.json is no file"),
        (("--workloads", "start", "--profile", "p"), "--profile needs a workload that runs more than once"),
        (
            ("--json", "nowhere/f.json"),
            "nowhere/f.json cannot be written, for there is no folder nowhere: make it first",
        ),
        (("--precision", "dens"), "did you mean 'dense'?"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "bench", *argv)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_file_of_something_else_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.json"
    file.write_text("[1, 2]")
    code, out, err = run(capsys, "bench", "--json", str(file))
    assert (code, out) == (2, "")
    assert f"{file} is no file of benchmark figures" in err


def test_nothing_that_fits_is_an_answer_too(shape: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "bench", "--shape", str(shape), "--workloads", "prefill_8k", *SMALL)
    assert code == 0
    assert "prefill_8k is left out" in err
    assert "peak memory" in out
