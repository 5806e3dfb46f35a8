"""The command line as its user sees it: output, exit codes, one-sentence errors."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plexor.cli import main
from plexor.extension.catalog import Catalog

SMALL = ["--device", "cpu", "--num-blocks", "16", "--max-tokens", "6", "--ignore-end"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_streams_text_and_then_figures(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", "--model", str(tiny), "--prompt", "hello", *SMALL)
    assert code == 0
    assert out.startswith("hello")
    assert "6 tokens in" in err
    assert all(word in err for word in ("tok/s", "first token after", "peak memory"))


def test_generate_json_is_one_object_that_repeats(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = ("--temperature", "1", "--seed", "3", "--json")
    _, first, _ = run(capsys, "generate", "--model", str(tiny), "--prompt", "hello", *SMALL, *drawing)
    _, again, _ = run(capsys, "generate", "--model", str(tiny), "--prompt", "hello", *SMALL, *drawing)
    answer = json.loads(first)
    assert len(answer["token_ids"]) == 6
    assert answer["finish_reason"] == "length"
    assert set(answer["times"]) == {"load_seconds", "first_token_seconds", "total_seconds"}
    assert answer["token_ids"] == json.loads(again)["token_ids"]


def test_generate_reads_the_prompt_from_standard_input(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    code, out, _ = run(capsys, "generate", "--model", str(tiny), "--prompt", "-", *SMALL)
    assert code == 0
    assert out.startswith("from a pipe")


def test_explain_counts_before_loading(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", str(tiny), "--device", "cpu", "--num-blocks", "8")
    assert code == 0
    for said in (
        "LlamaForCausalLM",
        "'llama'",
        "weights",
        "KV blocks",
        "activations",
        "graphs",
        "fits",
        "not triton: ",
    ):
        assert said in out


def test_explain_says_what_a_precision_is(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", str(tiny), "--device", "cpu", "--num-blocks", "8", "--precision", "fp8")
    spec = Catalog.load().precision("fp8")
    assert code == 0
    assert f"fp8: {spec.summary}" in out
    assert spec.needs in out


def test_eval_prints_a_row_for_each_format(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text to predict, twice over. " * 4)
    formats = ("--precision", "dense,fp8", "--kv", "dense,fp8", "--num-blocks", "16", "--device", "cpu")
    code, out, _ = run(capsys, "eval", "--model", str(tiny), "--text", str(text), *formats)
    assert code == 0
    assert [line.split("|")[1].strip() for line in out.splitlines()[2:]] == ["dense", "dense", "fp8", "fp8"]
    shown = [[cell.strip() for cell in line.split("|")[8:12]] for line in out.splitlines()[2:]]
    assert shown[0] == ["-", "-", "-", "model"], "the first row is what the others are compared with"
    for agreement, mean_kl, p99_kl, _ in shown[1:]:
        assert 50 < float(agreement.rstrip("%")) <= 100
        assert 0 < float(mean_kl) < float(p99_kl) < 1


def test_eval_against_another_checkpoint_puts_it_first_and_dense(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, text = tmp_path / "other", tmp_path / "text.txt"
    shutil.copytree(tiny, other)
    text.write_text("a text to predict, twice over. " * 4)
    given = ("--model", str(other), "--text", str(text), "--device", "cpu", "--window", "33")
    code, out, _ = run(
        capsys, "eval", *given, "--against", str(tiny), "--precision", "dense,fp8", "--kv", "fp8", "--json"
    )
    assert code == 0
    first, same, rounded = json.loads(out)
    assert [(row["model"], row["precision"], row["kv"]) for row in (first, same, rounded)] == [
        ("model", "dense", "dense"),
        ("other", "dense", "fp8"),
        ("other", "fp8", "fp8"),
    ]
    assert first["agreement"] is first["mean_kl"] is first["p99_kl"] is None
    assert 0 < same["mean_kl"] < rounded["mean_kl"]
    code, out, _ = run(capsys, "eval", *given, "--against", str(tiny), "--json")
    alike = json.loads(out)[1]
    assert (alike["agreement"], alike["mean_kl"], alike["loss"]) == (1, 0, first["loss"])


def test_eval_of_all_precisions_leaves_out_what_takes_only_its_own_weights(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text to predict.")
    given = ("--model", str(tiny), "--text", str(text), "--device", "cpu", "--precision", "all", "--json")
    code, out, _ = run(capsys, "eval", *given)
    assert code == 0
    precisions = Catalog.load().precisions
    taken = [name for name, spec in precisions.items() if not spec.selective]
    assert [row["precision"] for row in json.loads(out)] == taken
    assert len(taken) < len(precisions)


def test_eval_of_one_format_compares_with_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text to predict. " * 4)
    code, out, _ = run(capsys, "eval", "--model", str(tiny), "--text", str(text), "--device", "cpu", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert row["perplexity"] > 1
    assert row["agreement"] is None


def test_kernels_says_who_wins_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "kernels", "--device", "cpu", "--kernel", "paged_attention=reference")
    assert code == 0
    assert "paged_attention: reference\n" in out
    assert "not torch: --kernel paged_attention=reference" in out


def test_plugins_lists_states_and_offers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plugins", "--json")
    assert code == 0
    reports = {report["name"]: report for report in json.loads(out)}
    assert reports["plexor"]["state"] == "loaded"
    assert "LlamaForCausalLM" in reports["llama"]["offers"]["architectures"]
    _, table, _ = run(capsys, "plugins")
    assert all(name in table for name in reports)


def test_plugins_does_not_import_torch() -> None:
    script = (
        "import sys; from plexor.cli import main; code = main(['plugins']); sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["genrate"], "did you mean 'generate'"),
        (["generate", "--modle", "x"], "did you mean --model"),
        (["generate", "--model", "/nowhere/at/all", "--prompt", "x"], "no folder"),
        (["generate", "--model", "TINY"], "--prompt"),
        (["generate", "--model", "TINY", "--prompt", ""], "prompt"),
        (["generate", "--model", "TINY", "--prompt", "x" * 2000], "128"),
        (["generate", "--model", "TINY", "--prompt", "x", "--temperature", "nan"], "temperature is nan"),
        (["generate", "--model", "TINY", "--prompt", "x", "--top-p", "1.5"], "top_p is 1.5"),
        (["generate", "--model", "TINY", "--prompt", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "--model", "TINY", "--prompt", "x", "--precision", "fp9"], "did you mean 'fp8'"),
        (["generate", "--model", "TINY", "--prompt", "x", "--kv", "fp9"], "did you mean 'fp8'"),
        (["generate", "--model", "TINY", "--prompt", "x", "--kernel", "rms_norm"], "OP=PROVIDER"),
        (["generate", "--model", "TINY", "--prompt", "x", "--kernel", "rms_nrom=reference"], "did you mean 'rms_norm'"),
        (["generate", "--model", "TINY", "--prompt", "x", "--tp", "3"], "3"),
        (["generate", "--model", "TINY", "--prompt", "x", "--max-length", "9999"], "128"),
        (["generate", "--model", "TINY", "--prompt", "x", "--image", "/no/such.png"], "/no/such.png"),
        (["generate", "--model", "TINY", "--prompt", "x", "--max-sequences", "9999999999"], "max_sequences"),
        (["generate", "--model", "TINY", "--prompt", "x", "--block-size", "2147483647"], "lower --num-blocks"),
        (["eval", "--model", "TINY", "--text", __file__, "--window", "1"], "--window"),
        (["eval", "--model", "TINY", "--text", __file__, "--precision", "dense,fp9"], "did you mean 'fp8'"),
        (["chat", "--model", "TINY", "--quick", "hi"], "chat template"),
        (["eval", "--model", "TINY", "--text", "/no/such.txt"], "/no/such.txt"),
        (["eval", "--model", "TINY", "--text", __file__, "--against", "/no/such"], "/no/such"),
        (["eval", "--model", "TINY", "--text", __file__, "--against", "demo"], "one of 4,096"),
        (["eval", "--model", "TINY", "--text", __file__, "--tp", "2", "--precision", "dense,fp8"], "leave --tp out"),
        (["explain", "/nowhere/at/all"], "no folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:5])[:40],
)
def test_mistakes_end_in_one_sentence(
    tiny: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    sizes = ["--num-blocks", "16", "--device", "cpu"] if argv[0] in ("generate", "chat", "eval") else []
    code, _, err = run(capsys, *[str(tiny) if word == "TINY" else word for word in argv], *sizes)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "explain", "/nowhere/at/all", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_an_unknown_architecture_names_who_would_serve_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalML"]}))
    code, _, err = run(capsys, "explain", str(tmp_path))
    assert code == 2
    assert "did you mean 'LlamaForCausalLM'" in err


def test_the_plugin_that_is_gone_is_named_with_its_command(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLEXOR_PLUGINS", "")
    code, _, err = run(capsys, "explain", str(tiny))
    assert code == 2
    assert "llama" in err
