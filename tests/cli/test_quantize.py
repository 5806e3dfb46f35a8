"""`plexor quantize` as a user meets it: what it writes is what the other commands run, and errors are one line."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import transformers

from plexor.cli import main
from plexor.testing.checkpoints import write_checkpoint

PRECISION = "int8_wo"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=307,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "model", "LlamaForCausalLM", config)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([*argv, "--device", "cpu"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_what_is_written_runs_and_is_close_to_the_original(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("a text to predict, twice over. " * 12)
    code, said, _ = run(
        capsys, "quantize", str(model), "--precision", PRECISION, "-o", str(out), "--calibrate", str(text)
    )
    assert code == 0
    assert re.match(rf"wrote {out}: \d+\.\d\d KiB of tensors, 14 weights in {PRECISION}, 1 layers dense, in ", said)
    code, said, _ = run(capsys, "eval", "--model", str(out), "--against", str(model), "--text", str(text), "--json")
    assert code == 0
    first, ours = json.loads(said)
    assert (first["precision"], ours["precision"]) == ("dense", PRECISION)
    assert 0 < ours["mean_kl"] < 0.01


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that says why."""
    code, _, said = run(capsys, "quantize", *argv)
    assert code == 2
    assert said.count("\n") == 1
    return said


def test_what_is_given_wrongly_is_said_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe")
    for argv, said in [
        (("--precision", "int8_w"), "did you mean 'int8_wo'"),
        (("--precision", PRECISION, "--calibrate", str(tmp_path / "nothing")), "cannot be read"),
        (("--precision", PRECISION, "--calibrate", str(bad)), "not UTF-8 at byte 0"),
        (("--precision", PRECISION, "--dtype", "float8"), "dtype is 'float8'"),
    ]:
        assert said in refused(capsys, str(model), *argv, "-o", str(out))
    for place, said in [(model, "has something in it already"), (bad, "is a file"), (Path("/no/such/x"), "no folder")]:
        assert said in refused(capsys, str(model), "--precision", PRECISION, "-o", str(place))
    assert "no folder" in refused(capsys, "/no/such/model", "--precision", PRECISION, "-o", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_full_disk_is_found_before_any_work_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    said = refused(capsys, str(model), "--precision", PRECISION, "-o", str(tmp_path / "out"))
    assert re.search(r"no room for a checkpoint with \d\.\d\d GB of tensors", said)
    assert list(tmp_path.iterdir()) == []
