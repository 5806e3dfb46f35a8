"""bench/truth.py finds what sets a model's logits apart from the references', and says when that is too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench import truth

from plexor.config import EngineConfig
from plexor.errors import ConfigError

SMALL = ["--model", "demo", "--device", "cpu", "--positions", "26", "--requests", "1", "3", "--long-prompt", "37"]


def model(precision: str = "dense") -> truth.Model:
    config = EngineConfig(
        model="demo", device="cpu", precision=precision, num_blocks=64, max_sequences=5, prefix_caching=False
    )
    return truth.Model.of(config)


def rows_of(said: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")][1:]


def test_one_path_in_float32_is_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert truth.main([*SMALL, "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    rows = rows_of(said)
    assert [(row[0], int(row[1])) for row in rows] == [("1", 14), ("3", 18), ("all", 32)]
    assert all(float(row[2]) <= float(row[3]) < 1e-5 and row[4] == "100.00 %" for row in rows)
    assert "Held: " in said


def test_both_are_compared_with_float32(capsys: pytest.CaptureFixture[str]) -> None:
    truth.main([*SMALL, "--float32"])
    said = capsys.readouterr().out
    rows = rows_of(said)[2:]
    assert [row[0] for row in rows] == ["all", "the fast path against float32", "the references against float32"]
    assert all(0 < float(row[2]) <= float(row[3]) < 0.03 for row in rows)
    assert "From float32 the fast path is " in said


def test_random_weights_are_the_same_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tmp_path / "tiny.json"
    sizes = {"hidden_size": 72, "intermediate_size": 88, "num_hidden_layers": 3, "vocab_size": 307}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 99}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
    shape.write_text(json.dumps({**kind, **sizes, **heads}), encoding="utf-8")
    truth.main(["--shape", str(shape), "--float32", *SMALL[2:]])
    assert all(0 < float(row[2]) < 0.05 for row in rows_of(capsys.readouterr().out))


def test_a_path_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As if a kernel lost a hundredth and a half of what it should add, everywhere."""
    exact = truth.forced_logits
    monkeypatch.setattr(truth, "forced_logits", lambda core, answer: exact(core, answer) * 1.015)
    assert truth.main([*SMALL, "--dtype", "float32"]) == 1
    assert "MISSED: " in capsys.readouterr().out


def test_answers_are_compared_at_the_positions_that_drew_them() -> None:
    """In float32 nothing is left but the order of sums, so a position more or less would show."""
    made = truth.Model.of(EngineConfig(model="demo", device="cpu", dtype="float32", num_blocks=64, max_sequences=5))
    batches = truth.plan_batches(made, (2, 5), positions=30, long_prompt=61)
    assert [(len(batch.prompts), batch.num_tokens) for batch in batches] == [(2, 9), (5, 4)]
    answers = truth.answer_batches(made, batches)
    assert [len(answer.token_ids) for batch in answers for answer in batch] == [9] * 2 + [4] * 5
    truths = truth.true_logits(made.in_plain_torch("float32"), answers)
    for batch, own in zip(answers, truths, strict=True):
        found = truth.differences(batch, own)
        assert found.worst < 1e-5
        assert found.agreement == 1


def test_other_weights_are_found() -> None:
    made = model()
    answers = truth.answer_batches(made, truth.plan_batches(made, (3,), positions=12, long_prompt=20))
    truths = truth.true_logits(model("int8_sq").in_plain_torch("auto"), answers)
    assert truth.differences(answers[0], truths[0]).relative > truth.MOST_ERROR


def test_prompts_are_odd_and_one_of_them_is_long() -> None:
    made = model()
    (batch,) = truth.plan_batches(made, (4,), positions=1, long_prompt=333)
    assert [len(prompt) for prompt in batch.prompts] == [333, 5, 7, 9]
    assert batch.num_tokens == 1 + truth.LEAST_STEPS
    assert batch.blocks(16) == 22 + 3 * 1
    assert truth.plan_batches(made, (4,), positions=1, long_prompt=333) == [batch]
    with pytest.raises(ConfigError, match="2045 tokens and 4 more exceed the model's 2048"):
        truth.plan_batches(made, (4,), positions=1, long_prompt=2045)


def test_figures_of_a_difference() -> None:
    """Logits (3, 4) and (0, 2), of which the first is off by (0.3, 0.4) and the second drew the other token."""
    true, off = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.3, 4.4], [0.0, 2.0]])
    found = truth.difference(truth.Answer((1,), (1, 0), off), true)
    assert found.relative == pytest.approx(0.5 / 29**0.5)
    assert found.worst == pytest.approx(0.1)
    assert found.agreement == 0.5
    assert found.gap.tolist() == [1, 2]
    assert found.step.tolist() == [4 * 2**-23, 2 * 2**-23]
    assert not found.holds
    said = truth.about_gaps(found, "float32")
    assert "drawn at 1 of 2 positions: they are 2 apart" in said
    assert "Where they are further apart, 50.00 % have the same token." in said


def test_limits_are_exclusive() -> None:
    count = 100
    ones, none = torch.ones(count).double(), torch.zeros(count).double()
    one_parted = none.clone()
    one_parted[0] = 1
    assert truth.Difference(0.009 * ones, ones, ones, none, none).holds
    assert not truth.Difference(0.0101 * ones, ones, ones, none, none).holds
    assert not truth.Difference(none, ones, ones, none, one_parted).holds
