"""bench/truth.py finds what sets a model's logits apart from the references', and says when that is too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench import truth

from plexor.config import EngineConfig
from plexor.errors import ConfigError
from plexor.runtime.core import EngineCore

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
    truth.main(SMALL)
    said = capsys.readouterr().out
    rows = rows_of(said)[2:]
    assert [row[0] for row in rows] == ["all", "the fast path against float32", "the references against float32"]
    assert all(0 < float(row[2]) <= float(row[3]) < 0.03 for row in rows)
    assert "from float32 the fast path is " in said


def test_random_weights_are_the_same_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tmp_path / "tiny.json"
    sizes = {"hidden_size": 72, "intermediate_size": 88, "num_hidden_layers": 3, "vocab_size": 307}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 99}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
    shape.write_text(json.dumps({**kind, **sizes, **heads}), encoding="utf-8")
    truth.main(["--shape", str(shape), *SMALL[2:]])
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
    answers, _ = truth.answer_batches(made, batches)
    assert [len(answer.token_ids) for batch in answers for answer in batch] == [9] * 2 + [4] * 5
    truths = truth.true_logits(made.in_plain_torch("float32"), answers)
    for batch, own in zip(answers, truths, strict=True):
        found = truth.differences(batch, own)
        assert found.worst < 1e-5
        assert found.agreement == 1


def test_other_weights_are_found() -> None:
    made = model()
    answers, _ = truth.answer_batches(made, truth.plan_batches(made, (3,), positions=12, long_prompt=20))
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
    assert found.noise.tolist() == [pytest.approx(0.125**0.5), 0]
    assert not found.is_close
    said = truth.about_gaps(found, "float32")
    assert "drawn at 1 of 2 positions: they are 2 apart" in said
    assert "Where they are further apart, 50.00 % have the same token." in said


def differing(error: float, parted: int = 0, gap: float = 1.0, count: int = 100) -> truth.Difference:
    """`count` positions that are as far off, of which some drew another token."""
    ones = torch.ones(count).double()
    other = (torch.arange(count) < parted).double()
    return truth.Difference(error * ones, ones, error * ones, gap * ones, 0 * ones, other)


def test_plain_bounds_are_exclusive() -> None:
    assert differing(0.009).is_close
    assert not differing(0.0101).is_close
    assert not differing(0.0, parted=1).is_close


@pytest.mark.parametrize(
    ("found", "dtype", "ratio", "kept"),
    [
        (differing(0.009), torch.float16, 1.1, [True, True, True, True]),
        (differing(0.011), torch.float16, 1.1, [True, True, False, True]),
        (differing(0.009), torch.float16, 1.11, [True, False, True, True]),
        (differing(0.009, parted=2), torch.float16, 1.0, [True, True, True, False]),
        (differing(0.009, parted=2, gap=0.0179), torch.float16, 1.0, [True, True, True, True]),
        (differing(0.009, parted=2, gap=0.0181), torch.float16, 1.0, [True, True, True, False]),
        (differing(0.06, parted=30), torch.bfloat16, 1.1, [True, True]),
        (differing(0.06, parted=30), torch.bfloat16, 1.2, [True, False]),
        (differing(0.06, parted=30), torch.bfloat16, None, [True, False, False]),
        (differing(0.009), torch.float32, None, [True, True, True]),
    ],
)
def test_what_decides_depends_on_how_the_references_round(
    found: truth.Difference, dtype: torch.dtype, ratio: float | None, kept: list[bool]
) -> None:
    assert list(truth.verdicts(found, dtype, ratio).values()) == kept


def test_positions_that_are_much_further_off_are_named_with_their_step() -> None:
    """The third token of the second request, and one that is off by less than eight times the median."""
    answers = [truth.Answer((1,) * size, (5,) * 4, torch.zeros(4, 1), ("a", "b", "c", "d")) for size in (9, 3)]
    found = differing(0.002, count=8)
    found.error[6], found.error[1] = 0.3, 0.0159
    (line,) = truth.about_outliers(answers, found)
    assert line == "OUTLIER: 2 requests, request 1 (prompt of 3), token 2, c: off by 3.00e-01"
    assert not next(iter(truth.verdicts(found, torch.bfloat16, 1.0).values()))
    found.error[1] = 0.0161
    assert [line.split(": ")[1].split(",")[1] for line in truth.about_outliers(answers, found)] == [
        " request 1 (prompt of 3)",
        " request 0 (prompt of 9)",
    ]


def test_a_round_that_gives_other_logits_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until a token differs: what follows it has another text behind it."""
    exact = truth.answer_batch
    rounds = iter(range(9))

    def stray(core: EngineCore, batch: truth.Batch) -> list[truth.Answer]:
        answers = exact(core, batch)
        if next(rounds) == 3:
            answers[-1].logits[2, 7] += 1
        return answers

    monkeypatch.setattr(truth, "answer_batch", stray)
    assert truth.main([*SMALL, "--dtype", "float32", "--repeat", "1"]) == 1
    said = capsys.readouterr().out
    assert "round 1: 3 requests, request 2 (prompt of 7), token 2, step " in said
    assert "1 logits differ, 1 of them make up 90 % of it" in said
    assert "MISSED: logits that 1 more rounds gave otherwise: 1, none may." in said


def test_a_round_is_compared_up_to_the_first_other_token() -> None:
    logits = torch.arange(12.0).view(4, 3)
    first = truth.Answer((1,), (2, 2, 2, 2), logits)
    again = truth.Answer((1,), (2, 0, 2, 2), logits + 1)
    lines = truth.strayings([first], [again])
    assert [line.split("token ")[1][0] for line in lines] == ["0", "1"]


def test_a_step_is_described(tiny_answers: list[truth.Answer]) -> None:
    assert [answer.steps[0] for answer in tiny_answers] == ["step 0 of 0 decodes, 2 pieces of 25 rows"] * 2
    assert [answer.steps[-1].split(" of ")[1] for answer in tiny_answers] == ["2 decodes"] * 2


@pytest.fixture
def tiny_answers() -> list[truth.Answer]:
    made = model()
    ((answers,), _) = truth.answer_batches(made, truth.plan_batches(made, (2,), positions=4, long_prompt=20))
    return answers
